"""A policy at any ratio behind vLLM's own OpenAI-compatible server: the model name `policy@0.37` sets the dial.

What needs torch or vLLM is imported when it is first asked for, so that `import psacpo.serve` stays cheap.
"""

from __future__ import annotations

from psacpo.serve.config import ServeConfig

__all__ = ["ServeConfig", "serve"]


def serve(config: ServeConfig) -> int:
    """Run the server until it is told to stop, and give its exit code back; see `psacpo.serve.run.serve`."""
    from psacpo.serve.run import serve as job

    return job(config)
