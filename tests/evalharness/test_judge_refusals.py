"""What `judge` and its kin meet in the wild: odd judges, damaged files, code that will not behave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psacpo.config import validate
from psacpo.errors import InputError
from psacpo.evalharness import frontier
from psacpo.evalharness.checks import check
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.decision.compare import compare
from psacpo.evalharness.decision.from_scores import frontier_from_scores, scores_settings
from psacpo.evalharness.endpoint import url_and_key
from psacpo.evalharness.judges.guard_spec import read_spec
from psacpo.evalharness.judges.llm_replies import expected_value
from psacpo.evalharness.judges.llm_settings import LlmJudge
from psacpo.evalharness.judging.config import JudgeConfig, parse_judges
from psacpo.evalharness.judging.job import Judged, judge, plan
from psacpo.evalharness.records import read_records
from psacpo.files import write_atomically

MakeConfig = Callable[..., FrontierConfig]
RunCommand = Callable[..., subprocess.CompletedProcess[str]]
ROW = {"id": "a", "prompt": "p", "completion": "c"}
CODE = """
import sys
def leave(p, c): sys.exit(3)
def generator(p, c): raise GeneratorExit
def huge(p, c): return 1e300
class Mute(Exception):
    def __str__(self): raise RuntimeError
def mute(p, c): raise Mute
def chatty(p, c):
    print("\\x1b[31mhello")
    return 1
def interrupted(p, c): raise KeyboardInterrupt
def terminated(p, c): sys.exit(143)
"""


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(source: Path, judges: dict[str, Any], **more: Any) -> Judged:
    return judge(validate(JudgeConfig, {"source": source, "judges": judges} | more, where="test"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of judges that will not behave, by name."""
    name = f"odd_judges_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_code_that_misbehaves_is_an_invalid_verdict(
    tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "rows.jsonl", [ROW])
    names = {"leave": "SystemExit: 3", "generator": "GeneratorExit", "huge": "no finite number", "mute": "Mute"}
    judges = {name: {"kind": "python", "callable": f"{code}:{name}"} for name in [*names, "chatty"]}
    more = {"out": tmp_path / "s.jsonl", "allow_code": True, "max_invalid": 1}
    for _ in range(2):  # what was stored is read again
        run(source, judges, **more)
    said = {row["judge"]: row for row in map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())}
    for name, why in names.items():
        assert said[name]["valid"] is False
        assert why in said[name]["raw"]
    assert said["chatty"]["score"] == 1
    out = capsys.readouterr()
    assert "hello" not in out.out
    assert "hello" in out.err
    assert "\x1b" not in out.err


@pytest.mark.parametrize(("name", "error"), [("interrupted", KeyboardInterrupt), ("terminated", SystemExit)])
def test_ctrl_c_and_sigterm_are_not_a_verdict(tmp_path: Path, code: str, name: str, error: type[BaseException]) -> None:
    assert 128 + signal.SIGTERM == 143
    with pytest.raises(error):
        run(
            write(tmp_path / "rows.jsonl", [ROW]),
            {"x": {"kind": "python", "callable": f"{code}:{name}"}},
            out=tmp_path / "s.jsonl",
            allow_code=True,
        )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sample": float("inf")}, "sample is no whole number"),
        ({"sample": 10**400}, "sample is no whole number"),
        ({"n_tokens": float("inf")}, "n_tokens is no whole number"),
        ({"ratio": 10**400}, "ratio is no number"),
    ],
)
def test_numbers_without_end_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"row 1: {said}"):
        run(write(tmp_path / "rows.jsonl", [ROW | row]), {"r": {"kind": "refusal"}}, out=tmp_path / "s.jsonl")


@pytest.mark.parametrize("name", ["1", "null", "2024-01-01"])
def test_a_judge_whose_name_is_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / "j.yaml"
    path.write_text(f"{name}: {{kind: refusal}}\n")
    with pytest.raises(InputError, match="is no text; allowed: a name in quotes"):
        parse_judges([str(path)])


def test_a_pipe_or_device_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    source = write(tmp_path / "rows.jsonl", [ROW])
    with pytest.raises(InputError, match="is a device or a pipe"):
        run(source, {"r": {"kind": "refusal"}}, out=pipe)
    with pytest.raises(InputError, match="is a device or a pipe"):
        write_atomically(pipe, "x")
    assert pipe.is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "rows.jsonl"}


@pytest.mark.parametrize("change", [{"score": "1"}, {"score": [1]}, {"score": 1e40}, {"score": True}, {"usage": 3}])
def test_a_damaged_verdict_is_told_and_never_believed(tmp_path: Path, change: dict[str, Any]) -> None:
    source = write(tmp_path / "rows.jsonl", [ROW])
    settings: dict[str, Any] = {"judges": {"r": {"kind": "refusal"}}, "cache": tmp_path / "cache"}
    run(source, **settings, out=tmp_path / "s.jsonl")
    kept = tmp_path / "cache" / "verdicts.jsonl"
    good = kept.read_text()
    write(kept, [json.loads(good) | change])
    with pytest.raises(InputError, match=r"verdicts\.jsonl line 1 is damaged"):
        run(source, **settings, out=tmp_path / "other.jsonl")
    kept.write_text(good)
    write(tmp_path / "s.jsonl", [json.loads((tmp_path / "s.jsonl").read_text()) | change])
    with pytest.raises(InputError, match=r"s\.jsonl holds a damaged verdict"):
        run(source, **settings, out=tmp_path / "s.jsonl")


@pytest.mark.parametrize("deep", ["[" * 100_000, "[1]", "3"])
def test_records_that_are_none(tmp_path: Path, deep: str) -> None:
    with pytest.raises(InputError, match="line 1 is damaged"):
        read_records(write(tmp_path / "records.jsonl", [deep]))


@pytest.mark.parametrize("scores", [[1], "score", {"score": 3}, {"score": None}])
def test_an_inspect_log_with_damaged_scores(tmp_path: Path, scores: Any) -> None:
    log = tmp_path / "log.json"
    log.write_text(json.dumps({"samples": [{"id": 1, "scores": scores}]}))
    with pytest.raises(InputError, match="sample 1: its scores are damaged"):
        run(write(tmp_path / "rows.jsonl", [ROW]), {"i": {"kind": "import", "path": log}}, out=tmp_path / "s.jsonl")


@pytest.mark.parametrize(
    "given", [3, {"content": 3}, {"content": [3]}, {"content": [{"token": "5", "top_logprobs": 3}]}]
)
def test_probabilities_of_another_form_than_the_references(given: Any) -> None:
    assert expected_value({"logprobs": given}, "score", {1: 1.0, 5: 5.0}) is None
    text = {"token": '{"score": 5', "top_logprobs": [{"token": "5", "logprob": "x"}]}
    assert expected_value({"logprobs": {"content": [text]}}, "score", {1: 1.0, 5: 5.0}) is None


def test_an_endpoint_that_cannot_be_asked_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(url: str) -> LlmJudge:
        return LlmJudge(kind="llm", model="m", rubric="helpfulness", base_url=url)

    for url in ("http://[::1/v1", "http://host:99999999/v1", "http://host:x/v1"):
        with pytest.raises(InputError, match="base_url is no URL"):
            url_and_key(settings(url), what="judge 'x'", setting="base_url")
    for key in ("sécret", "sick\nend"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(InputError, match="the key in OPENAI_API_KEY holds") as refused:
            url_and_key(settings("http://[::1]:8000/v1"), what="judge 'x'", setting="base_url")
        assert key.split()[0] not in str(refused.value)


def test_imported_scores_are_not_judged_again(tmp_path: Path) -> None:
    rows = [{"prompt_id": f"p{i}", "ratio": q, "cost": i + q, "reward": q} for q in (0, 1) for i in range(3)]
    made = frontier_from_scores(scores_settings(write(tmp_path / "s.jsonl", rows), out=tmp_path / "run"))
    for job in (judge, plan):
        with pytest.raises(InputError, match="is a run of imported scores, which are not judged again"):
            job(validate(JudgeConfig, {"source": made, "judges": {"r": {"kind": "refusal"}}}, where="test"))


def test_a_run_with_damaged_files_is_left_as_it_is(make_config: MakeConfig, tmp_path: Path) -> None:
    judges = {
        "reward": {"kind": "length", "unit": "characters", "better": "higher"},
        "cost": {"kind": "repetition"},
    }
    made = frontier(make_config(judges=judges, max_invalid=1))
    whole = contents(made)
    # Verdicts of before there was `content`: nothing that could be found again, and no reason to stop.
    old = [json.loads(line) for line in whole["verdicts.jsonl"].splitlines()]
    for record in old:
        del record["content"]
    torn = write(made / "verdicts.jsonl", [*old, json.dumps(old[0])[:20]])
    torn.write_bytes(torn.read_bytes()[:-1])
    found = run(made, {"cost": {"kind": "repetition", "n": 1}}, max_invalid=1).result["judges"]
    assert set(found) == {"reward", "cost"}
    for name, blob in whole.items():
        (made / name).write_bytes(blob)
    for name, change in [
        ("verdicts.jsonl", {"judge_digest": None}),
        ("verdicts.jsonl", {"completion": 3}),
        ("completions.jsonl", {"policy": None}),
        ("completions.jsonl", {"sample": [0]}),
        ("completions.jsonl", {"n_tokens": "x"}),
        ("verdicts.jsonl", {"key": [3]}),
        ("prompts.jsonl", {"prompt": 3}),
        ("prompts.jsonl", {"cluster": None}),
    ]:
        first, *rest = whole[name].decode().splitlines()
        write(made / name, [json.loads(first) | change, *rest])
        before = contents(made)
        with pytest.raises(InputError, match="line 1 is damaged"):
            run(made, {"w": {"kind": "length", "unit": "words"}})
        with pytest.raises(InputError, match="is damaged"):
            compare(made, made)
        assert contents(made) == before
        (made / name).write_bytes(whole[name])
    first, *rest = whole["base_log_probs.jsonl"].decode().splitlines()
    write(made / "base_log_probs.jsonl", [json.loads(first) | {"key": [3]}, *rest])
    with pytest.raises(InputError, match="line 1 is damaged"):
        run(made, {"w": {"kind": "length", "unit": "words"}})
    (made / "base_log_probs.jsonl").write_bytes(whole["base_log_probs.jsonl"])
    first, *rest = whole["completions.jsonl"].decode().splitlines()
    write(made / "completions.jsonl", [json.loads(first) | {"policy": "other"}, *rest])
    with pytest.raises(
        InputError, match="holds answers of policy 'other', which is none of the run's; allowed: policy@"
    ):
        run(made, {"w": {"kind": "length", "unit": "words"}})


def test_a_guards_spec_or_template_that_is_no_text(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    words = 'outputs: {harm: {labels: {a: ["yes"], b: ["no"]}, positive: [a]}}\n'
    for line, match in (('markers: [""]', "a marker is empty"), ('source: "\\ud800"', "half a surrogate pair")):
        spec.write_text(f"{words}{line}\n")
        with pytest.raises(InputError, match=match):
            read_spec(str(spec))
    settings = {"kind": "scalar", "model": "m", "template": "{prompt} {completion} \ud800"}
    with pytest.raises(InputError, match="half a surrogate pair"):
        validate(JudgeConfig, {"source": tmp_path, "judges": {"s": settings}}, where="test")


def test_a_cache_that_cannot_be_made(tmp_path: Path, psacpo: RunCommand) -> None:
    source = write(tmp_path / "rows.jsonl", [ROW])
    for place, match in (
        ("/proc/none/there", "no directory can be made there"),
        ("", "'--cache': it names no directory"),
    ):
        done = psacpo("judge", source.name, "--judge", "refusal", "--cache", place, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert match in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_judge_of_what_is_not_measured_is_refused_before(make_config: MakeConfig) -> None:
    judges = {
        "reward": {"kind": "length", "unit": "characters", "better": "higher"},
        "cost": {"kind": "repetition"},
        "far": {"kind": "kl_to_base"},
    }
    with pytest.raises(InputError, match="judge 'far' is of kind kl_to_base, which this sweep does not measure"):
        check(make_config(judges=judges, generation={"kl_to_base": False}))
    check(make_config(judges=judges))
