"""Say what is in a shard set, complete or not.

    python -m tools.inspect SET [--targets NAME] [--id UTTERANCE | --listen N --to DIR --audio-root DIR] [--json]

Tables are read, not shards, unless an utterance is asked for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from sm_train.errors import UserError, run_command
from tools.inspect import one, open_set, summary
from tools.verify import target_sets


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m tools.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("shard_set", help="folder or address of a shard set")
    parser.add_argument("--targets", metavar="NAME", help="this target set only; needed where the set is remote")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--id", metavar="UTTERANCE", help="all about one utterance")
    what.add_argument("--listen", type=int, default=0, metavar="N", help="write N utterances as WAV with their text")
    parser.add_argument("--to", type=Path, metavar="DIR", help="with --listen: where to")
    parser.add_argument("--audio-root", type=Path, metavar="DIR", help="with --listen: the manifest's folder")
    parser.add_argument("--seed", type=int, default=0, help="with --listen: which utterances")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    asked = parser.parse_args(argv)
    if asked.listen and not (asked.to and asked.audio_root):
        raise UserError("--listen reads the audio and writes WAV: give --to and --audio-root (the manifest's folder)")
    with tempfile.TemporaryDirectory(prefix="sm-inspect-") as cache:
        found = open_set(asked.shard_set, asked.targets, Path(cache))
        targets = target_sets(found.root)
        if asked.targets and asked.targets not in targets:
            raise UserError(f"{found.uri} has no target set {asked.targets!r}; it has: {', '.join(targets) or 'none'}")
        targets = [asked.targets] if asked.targets else targets
        if asked.listen:
            print("\n".join(one.listen(found, asked.listen, asked.seed, asked.to, asked.audio_root)), flush=True)
            return
        facts = one.utterance(found, asked.id, targets) if asked.id is not None else summary.summarise(found, targets)
    lines = one.in_words(facts) if asked.id is not None else summary.in_words(facts)
    print(json.dumps(facts, indent=1) if asked.json else "\n".join(lines), flush=True)


if __name__ == "__main__":
    run_command(main)
