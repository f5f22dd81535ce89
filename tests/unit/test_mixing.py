"""Several shard sets as one: shares of frames, one table, rows and features as in the sets, contracts, a whole run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sm_train.data.hashing import tensors_hash
from sm_train.data.loader import plan_items
from sm_train.data.mixing import MixedItems, Sources
from sm_train.data.target_set import EMBEDDING, TargetSet, join
from sm_train.errors import UserError
from sm_train.train import loop
from tests import training


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """12 and 150 utterances; the first's table lacks words that nobody says there."""
    root = tmp_path_factory.mktemp("mixing")
    made = [training.shard_set(root / name, n, seed, rows_seed=9) for name, n, seed in (("a", 12, 156), ("b", 150, 1))]
    tensors = load_file(made[0] / "targets" / training.TARGET / EMBEDDING)
    opened = TargetSet(made[0], training.TARGET)
    said = np.unique(np.concatenate([opened.samples[row]["tokens"] for row in range(12)]))
    keep = torch.from_numpy(np.isin(tensors["ids"].numpy(), [training.PAD_ID, *said]))
    assert 0 < keep.sum() < len(training.WORDS) - 1
    rewrite(made[0], {}, {name: tensor[keep].clone() for name, tensor in tensors.items()})
    return made


def rewrite(folder: Path, change: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Another contract, or table, of the set's targets."""
    root = folder / "targets" / training.TARGET
    contract = json.loads((root / "dataset.json").read_text())
    if tensors is not None:
        save_file(tensors, root / EMBEDDING)
        change = {**change, "embedding_hash": tensors_hash(tensors)}
    (root / "dataset.json").write_text(json.dumps({**contract, **change}))


@pytest.fixture(scope="module")
def mixed(folders: list[Path]) -> MixedItems:
    found = Sources({str(folders[0]): 1, str(folders[1]): 3}, training.TARGET).training(["train"], 5)
    assert isinstance(found, MixedItems)
    return found


def test_a_micro_batch_of_several_sets_has_their_features_and_tokens(folders: list[Path], mixed: MixedItems) -> None:
    rng = np.random.default_rng(0)
    for items in (rng.choice(len(mixed), 12, replace=False), np.array([3, 1]), np.array([len(mixed) - 1])):
        batch = mixed.collate(items)
        assert batch.num_frames_B.tolist() == mixed.lengths[items].tolist()
        assert batch.num_tokens_B.tolist() == mixed.columns["num_tokens"][items].tolist()
        assert batch.feats_BTE.shape[1] == mixed.lengths[items].max()
        texts = mixed.utterances.column("text").to_pylist()
        for b, item in enumerate(items):
            number = int(item >= len(mixed.sets[0]))
            own = item - number * len(mixed.sets[0])
            alone = mixed.sets[number].collate(np.array([own]))
            frames, tokens = int(batch.num_frames_B[b]), int(batch.num_tokens_B[b])
            assert torch.equal(batch.feats_BTE[b, :frames], alone.feats_BTE[0])
            assert not batch.feats_BTE[b, frames:].any()
            targets_LD = mixed.targets.rows_RD[batch.token_rows_BL[b, :tokens]]
            assert torch.equal(targets_LD, mixed.sets[number].targets.rows_RD[alone.token_rows_BL[0]])
            assert (batch.token_rows_BL[b, tokens:] == mixed.targets.pad_row).all()
            assert mixed.targets.text(batch.token_rows_BL[b, :tokens].numpy()) == texts[batch.ordinals[b]]


def test_shares_of_frames_are_the_weights_and_the_scarcest_is_through_once(mixed: MixedItems) -> None:
    frames = mixed.lengths[mixed.of_epoch(0)]
    first = mixed.of_epoch(0) < len(mixed.sets[0])
    shares = [frames[first].sum() / frames.sum(), frames[~first].sum() / frames.sum()]
    assert shares == pytest.approx(mixed.weights, abs=0.08)
    sizes = {len(one) for one in mixed.sets}
    assert {int(first.sum()), int((~first).sum())} & sizes


@pytest.mark.parametrize("steps", [0, 3, 60])
def test_no_item_comes_again_before_its_set_is_through(mixed: MixedItems, steps: int) -> None:
    mixed.set_epoch_steps(steps, training.FRAMES, training.LANES, 4096)
    planner = plan_items(mixed, 5, training.FRAMES, training.LANES)
    counted: Counter[int] = Counter()
    for epoch in range(30 if steps < 60 else 4):
        made = planner.epoch(epoch)
        if steps:
            assert made.num_steps == pytest.approx(steps, rel=0.25, abs=1)
        counted.update(made.items.tolist())
        edge = len(mixed.sets[0])
        for items in (range(edge), range(edge, len(mixed))):
            times = [counted[item] for item in items]
            assert max(times) - min(times) <= 1
    assert max(counted.values()) > 1
    mixed.set_epoch_steps(0, training.FRAMES, training.LANES, 4096)


def test_neither_order_nor_scale_of_the_weights_changes_anything(folders: list[Path], mixed: MixedItems) -> None:
    again = Sources({str(folders[1]): 1.5, str(folders[0]): 0.5}, training.TARGET).training(["train"], 5)
    assert again.dataset == mixed.dataset
    assert again.of_epoch(3).tolist() == mixed.of_epoch(3).tolist()  # type: ignore[union-attr]
    other = Sources({str(folders[1]): 1, str(folders[0]): 1}, training.TARGET).training(["train"], 5)
    assert other.dataset != mixed.dataset


def test_the_joined_table_is_the_union_and_its_scale_the_mean_over_tokens(folders: list[Path]) -> None:
    sets = [TargetSet(folder, training.TARGET) for folder in folders]
    joined = join(sets)
    assert joined.token_ids.tolist() == sorted({*sets[0].token_ids.tolist(), *sets[1].token_ids.tolist()})
    for one in sets:
        rows = np.searchsorted(joined.token_ids, one.token_ids)
        assert torch.equal(joined.rows_RD[rows], one.rows_RD)
    counts = [one.table.column("num_tokens").to_numpy().sum() for one in sets]
    squares = [one.contract["mean_square"] for one in sets]
    assert joined.contract["mean_square"] == pytest.approx(np.dot(counts, squares) / sum(counts))
    # The second set's table has all that the first's has.
    assert joined.contract["embedding_hash"] == sets[1].contract["embedding_hash"]
    assert sets[0].contract["embedding_hash"] != sets[1].contract["embedding_hash"]


@pytest.mark.parametrize("name", ["llm", "llm_revision", "tokenizer_hash", "pad_id", "normaliser"])
def test_targets_of_another_llm_are_refused_with_both_values(folders: list[Path], tmp_path: Path, name: str) -> None:
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    rewrite(other, {name: 1})
    with pytest.raises(UserError, match=rf"{name} is .* there, but .* is asked for; sets are mixed by targets of one"):
        Sources({str(folders[0]): 1, str(other): 1}, training.TARGET)


def test_another_value_in_a_row_both_have_is_refused(folders: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    tensors = load_file(other / "targets" / training.TARGET / EMBEDDING)
    tensors["rows"][3, 5] += 1e-6
    rewrite(other, {}, tensors)
    with pytest.raises(UserError, match="a token has other values there"):
        Sources({str(folders[0]): 1, str(other): 1}, training.TARGET)


def test_features_of_another_encoder_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    contract = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**contract, "layer": 24}))
    with pytest.raises(UserError, match=r"layer is .*, but .* is asked for; sets are mixed by features of one encoder"):
        Sources({str(folders[0]): 1, str(other): 1}, training.TARGET)


def test_the_same_set_twice_is_refused(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "copy")
    with pytest.raises(UserError, match="shards names the same set twice"):
        Sources({str(folders[0]): 1, str(tmp_path / "copy"): 1}, training.TARGET)


def test_splits_come_from_the_sets_that_have_them(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources({str(folder): 1 for folder in folders}, training.TARGET)
    assert len(sources.validation(["valid"])) == 2 + 19
    held = [["train"], ["train", "valid"]]
    monkeypatch.setattr(sources, "_held", lambda splits: [[s for s in splits if s in one] for one in held])
    assert len(sources.validation(["valid"])) in (2, 19)
    with pytest.raises(UserError, match="has no utterance in split 'valid'; leave it out"):
        sources.training(["valid"], 0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no shard set has an utterance in split 'dev'; they have: train, valid"):
        sources.validation(["valid", "dev"])


# ---- configs and runs


def test_a_config_names_one_folder_or_several(folders: list[Path], tmp_path: Path) -> None:
    one, both = str(folders[0]), {str(folder): 1 for folder in folders}
    path = training.write_config(tmp_path / "run.yaml", folders[0])
    assert training.load(path).shards == one
    mixed = training.load(path, f"shards={{{folders[0]}: 2, {folders[1]}: 1}}", "batch.epoch_steps=7")
    assert mixed.shards == {str(folders[0]): 2, str(folders[1]): 1}
    assert mixed.batch.epoch_steps == 7
    path = training.write_config(tmp_path / "both.yaml", both)
    assert training.load(path).shards == both
    assert training.load(path, f"shards={folders[1]}").shards == str(folders[1])
    assert training.load(path, f"shards={{{folders[1]}: 3}}").shards == {str(folders[1]): 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shards={a: 0}"], "the weight of a in shards is 0; it must be a number above 0"),
        (["shards={a: x}"], "the weight of a in shards is 'x'"),
        (["shards=[a, b]"], "it must be a folder, or a mapping"),
        (["batch.epoch_steps=-1"], "batch.epoch_steps is -1; it must be 0 or more"),
        (["batch.epoch_steps=5"], "batch.epoch_steps is for several sets mixed"),
    ],
)
def test_what_no_run_can_take_is_an_error(tmp_path: Path, words: list[str], message: str) -> None:
    path = training.write_config(tmp_path / "run.yaml", Path("a"))
    with pytest.raises(UserError, match=message):
        training.load(path, *words)


def test_a_run_on_several_sets_goes_on_as_if_undisturbed_and_only_with_the_same_mixture(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {str(folders[0]): 1.0, str(folders[1]): 3.0}
    paths = [
        training.write_config(tmp_path / f"{name}.yaml", shards, batch={"epoch_steps": 4})
        for name in ("whole", "halves")
    ]
    training.train(paths[0])
    real = loop.learning_rate

    def stop(cfg: Any, step: int, steps: int) -> float:
        if step == 8:
            raise RuntimeError("stopped")
        return float(real(cfg, step, steps))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            training.train(paths[1])
    training.train(paths[1])
    whole, halves = (path.with_suffix("") for path in paths)
    assert training.losses(halves) == training.losses(whole)
    assert max(line["epoch"] for line in training.metrics(whole)) > 0
    assert "valid_wer" in training.metrics(whole)[-1]
    latest = [training.tensors_of(run / "checkpoints/latest") for run in (whole, halves)]
    training.assert_equal(*latest)
    other = f"shards={{{folders[0]}: 1, {folders[1]}: 1}}"
    with pytest.raises(UserError, match="shards is "):
        training.train(paths[0], other)
    with pytest.raises(UserError, match=r"batch\.epoch_steps is 4 there, but 5"):
        training.train(paths[0], "batch.epoch_steps=5")
