"""Bytes on disk by stage, from the layout of the files that the stages write."""

from __future__ import annotations

import math

from sm_train import files
from tools.plan_capacity import formulas
from tools.plan_capacity.corpus import Corpus
from tools.plan_capacity.shapes import Shapes

_SHARD_BYTES = 1 << 26
_TARGET_PART = 16_384
_PARQUET_ROW, _PARQUET_TEXT = 45.0, 0.5
"""utterances.parquet: bytes of a row besides its text, and of a byte of text; 68 in all on the miniature."""
_TOKENS_ROW = 43.0
"""tokens.parquet, a row: measured on the miniature."""
_TASK_ROW, _TASK_TEXT, _TASK_TOKEN = 8.0, 0.65, 1.8
"""tasks.parquet: a row, a byte and a token of its answer; 40 to 46 in all on the miniature."""
_SMALL = 3_000
"""contract.json, dataset.json, quarantine.parquet and the like, together."""
_INDEX = 350
"""index.json, a shard: in its part and in the set's own."""
_REF = {"shard": "shard.00000.mds", "xxh3": "0" * 16}
_HYPOTHESIS, _EXAMPLE, _PICTURES = 215.0, 9_000.0, 240_000.0
"""hypotheses.jsonl, a line without its texts; report.html and results.json: measured on the miniature."""
_LOG_UNIT = 290
"""log.jsonl, a unit."""


def features(corpus: Corpus, shapes: Shapes) -> dict[str, float]:
    """A shard set without its targets: MDS samples, and what describes them."""
    frames = float(corpus.frames(shapes.frame_hz).mean())
    head = 3 if max(frames, shapes.width) < 256 else 5  # of an array: its rank and shape
    sample = 4 + 8 + corpus.id_bytes + head + formulas.FEATURE_BYTES * frames * shapes.width
    parts = math.ceil(corpus.num_all / shapes.precompute.unit_utterances)
    shards = max(parts, corpus.num_all * sample / _SHARD_BYTES)
    table = corpus.num_all * (_PARQUET_ROW + _PARQUET_TEXT * corpus.text_bytes)
    return {
        "features": corpus.num_all * sample,
        "tables": corpus.num_all * _done_row(corpus) + table + shards * 2 * _INDEX + parts * _LOG_UNIT + _SMALL,
    }


def _done_row(corpus: Corpus) -> float:
    """A row of a part's _DONE.json, by writing one."""
    numbers = {"duration_s": 4.7746875, "index": 100, "num_frames": 119, "start_s": 0.0}
    texts = {"audio": "", "id": "", "lang": "en", "speaker": "a speaker", "split": "train", "text": ""}
    return _json_bytes({**numbers, **texts, **_REF}) + corpus.id_bytes + corpus.audio_bytes + corpus.text_bytes


def _json_bytes(row: dict[str, object]) -> int:
    """What one more row adds to a part's record."""
    return len(files.json_bytes({"rows": [row, row]})) - len(files.json_bytes({"rows": [row]}))


def targets(corpus: Corpus, shapes: Shapes) -> dict[str, float]:
    """All target sets of precompute's config, taken to be alike: ids, tables, the rows of the embedding in use."""
    sets, rows = len(shapes.precompute.targets), min(corpus.used_rows, shapes.llm.vocabulary)
    ids = corpus.num_all * (4 + 8 + corpus.id_bytes + 2 + 4 * corpus.tokens)
    done = _json_bytes({"id": "", "index": 1000, "num_tokens": 10, "utterance": 1000, **_REF}) + corpus.id_bytes
    parts = math.ceil(corpus.num_all / _TARGET_PART)
    tables = corpus.num_all * (done + _TOKENS_ROW) + corpus.tokenizer_bytes + parts * 2 * _INDEX + _SMALL
    return {"token ids": sets * ids, "tables": sets * tables, "embedding": sets * rows * (2 * shapes.llm.width + 4)}


def tasks(corpus: Corpus) -> dict[str, float]:
    """tasks.parquet of one target set."""
    row = _TASK_ROW + _TASK_TEXT * corpus.answer_bytes + _TASK_TOKEN * corpus.tokens
    return {"tasks": corpus.num_all * corpus.tasks * row + _SMALL}


def checkpoint(parameters: float) -> float:
    """One checkpoint: weights and both moments in fp32, and small files."""
    return formulas.CHECKPOINT_BYTES * parameters + 3 * 110 * 70 + 8_000


def num_saves(steps: int, save_every: int, validate_every: int) -> int:
    """Saves of a run, at most: at multiples of save_every, at the last step, and where a validation is the best."""
    either = steps // save_every
    if validate_every:
        either += steps // validate_every - steps // math.lcm(save_every, validate_every)
    has_last = steps % save_every == 0 or (validate_every > 0 and steps % validate_every == 0)
    return either + (not has_last)


def checkpoints(parameters: float, steps: int, save_every: int, validate_every: int, keep: int) -> dict[str, float]:
    """What a run leaves, the best checkpoint being among the newest; ``while saving`` is the next one beside them."""
    saves, one = num_saves(steps, save_every, validate_every), checkpoint(parameters)
    return {"checkpoints": min(saves, keep) * one, "while saving": one if saves > 1 else 0.0, "metrics": steps * 900.0}


def evaluation(corpus: Corpus, shapes: Shapes, texts: int) -> dict[str, float]:
    """Hypotheses, and a report that holds the audio of its examples; ``texts`` systems besides the mapped ones."""
    cfg, questions = shapes.evaluate, corpus.num_test * corpus.tasks
    # The cascade's and the mappers' own transcripts are systems of their own.
    hypotheses = (texts + shapes.systems) * questions + (texts - 1 + shapes.systems) * corpus.num_test
    shown = cfg.examples * len(cfg.splits)
    audio = (
        corpus.audio_mb_per_hour * 1e6 * corpus.test_s / max(corpus.num_test, 1) / 3600 * 4 / 3
        if cfg.audio_root
        else 0.0
    )
    answers = hypotheses * (_HYPOTHESIS + 2 * corpus.answer_bytes)
    return {"hypotheses": answers, "report": shown * (audio + _EXAMPLE) + _PICTURES}
