"""Weights in pickle are never read: what to type to have them as safetensors. No torch here."""

from __future__ import annotations

import shlex
from pathlib import Path


def adapter_command(path: Path) -> str:
    """The command that writes adapter_model.safetensors beside the adapter_model.bin of an adapter directory."""
    return _command(
        f"import torch, safetensors.torch as s; p = {str(path / 'adapter_model')!r}; "
        "t = torch.load(p + '.bin', map_location='cpu', weights_only=True); "
        "s.save_file({k: v.clone().contiguous() for k, v in t.items()}, p + '.safetensors', {'format': 'pt'})"
    )


def model_command(path: Path) -> str:
    """The command that writes a causal language model kept in pickle as safetensors, to a directory beside it."""
    return _command(
        f"import transformers as t; p = {str(path)!r}; o = p + '-safetensors'; "
        "t.AutoModelForCausalLM.from_pretrained(p, dtype='auto').save_pretrained(o); "
        "t.AutoTokenizer.from_pretrained(p).save_pretrained(o)"
    )


def _command(code: str) -> str:
    return f"python -c {shlex.quote(code)}"
