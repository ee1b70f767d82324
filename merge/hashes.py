"""Digests of inputs that are learned while a merge reads them, so that no pass through them is made for that alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psacpo.merge.models import ModelDirectory
from psacpo.merge.shards import hash_tensor, join_digests, open_input, read_at


class InputHashes:
    """XXH3-128 of tensors of some models, as far as they are known; the rest is read when it is asked for.

    Attributes:
        known: (place of the model, tensor) -> the hash of its bytes there.
    """

    def __init__(self, models: Sequence[ModelDirectory]) -> None:
        self.models = list(models)
        self.known: dict[tuple[int, str], bytes] = {}

    def learn(self, hashes: Mapping[tuple[int, str], bytes]) -> None:
        """Take over what went through elsewhere."""
        self.known.update(hashes)

    def digests(self) -> list[dict[str, str]]:
        """For each model: file name -> digest, as `psacpo.merge.shards` says."""
        return [
            {shard: self._file_digest(place, model, shard) for shard in model.shards}
            for place, model in enumerate(self.models)
        ]

    def _file_digest(self, place: int, model: ModelDirectory, shard: str) -> str:
        begin, entries = model.shards[shard]
        path = model.path / shard
        with open_input(path) as descriptor:
            for name, entry in entries.items():
                if (place, name) not in self.known:
                    self.known[place, name] = hash_tensor(
                        descriptor, path, begin + entry.start, entry.end - entry.start
                    )
            header = read_at(descriptor, path, 0, begin)
        return join_digests(header, (self.known[place, name] for name in entries))
