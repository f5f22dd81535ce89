"""Parts that carry the embedding rows themselves, against what training gathers from the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sm_train.data.batches import SpeechItems
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models import targets
from sm_train.models.target_parts import PartWriter
from sm_train.models.targets import TargetConfig
from tests import builders, tuning
from tests.mosaic import streaming as mosaic

DTYPES = ("float32", "float16", "bfloat16")
COUNT = len(tuning.TEXTS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A shard set of five utterances with room for every token."""
    return tuning.spoken(tmp_path / "set", tuning.TEXTS, [400] * COUNT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_what_a_batch_gathers_is_bit_equal_to_the_stored_vectors(
    root: Path, tmp_path: Path, family: str, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = builders.llm(tmp_path / "llm", family=family, dtype=dtype)
    targets.build(TargetConfig("v", str(folder), normaliser="none", store="vectors"), root)
    found = TargetSet(root, "v")
    batch = SpeechItems(root, found, ["train"]).collate(np.arange(COUNT))
    gathered_BLD = found.rows_RD[batch.token_rows_BL]
    llm = AutoModelForCausalLM.from_pretrained(folder)
    theirs = mosaic.LocalDataset(str(found.root))  # MosaicML's reader, over the whole set
    assert len(theirs) == COUNT
    for b in range(COUNT):
        sample, count = theirs[b], int(batch.num_tokens_B[b])
        stored_LD = torch.from_numpy(sample["vectors"].copy())
        if dtype == "bfloat16":
            assert sample["vectors"].dtype == np.uint16
            stored_LD = stored_LD.view(torch.bfloat16)
        assert stored_LD.dtype == gathered_BLD.dtype == getattr(torch, dtype)
        assert stored_LD.shape == (count, 16)
        assert stored_LD.equal(gathered_BLD[b, :count])
        with torch.inference_mode():
            assert stored_LD.equal(llm.get_input_embeddings()(torch.from_numpy(sample["tokens"].copy()).long()))
        assert sample["id"] == f"utt-{b}"


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        ("float32", "[tokens, width] float32 as float32"),
        ("float16", "[tokens, width] float16 as float16"),
        ("bfloat16", "[tokens, width] bfloat16 as uint16, which holds the bits of each number"),
    ],
)
def test_the_contract_says_how_vectors_are_stored(root: Path, tmp_path: Path, dtype: str, says: str) -> None:
    folder = builders.llm(tmp_path / "llm", dtype=dtype)
    targets.build(TargetConfig("v", str(folder), store="vectors"), root)
    targets.build(TargetConfig("i", str(folder)), root)
    vectors, ids = TargetSet(root, "v"), TargetSet(root, "i")
    assert (vectors.contract["store"], vectors.contract["dtype"], vectors.contract["vectors"]) == (
        "vectors",
        dtype,
        says,
    )
    assert (ids.contract["store"], ids.contract["columns"]) == ("ids", {"id": "str", "tokens": "ndarray:int32"})
    assert "vectors" not in ids.contract
    assert vectors.contract["embedding_hash"] == ids.contract["embedding_hash"]
    assert all((vectors.rows_of(i) == ids.rows_of(i)).all() for i in range(COUNT))


def test_the_other_store_is_another_contract(root: Path, llm_folder: Path) -> None:
    targets.build(TargetConfig("v", str(llm_folder)), root)
    with pytest.raises(UserError, match=r"store is 'ids' there, but 'vectors' is asked for; remove .* or give another"):
        targets.build(TargetConfig("v", str(llm_folder), store="vectors"), root)
    with pytest.raises(ValueError, match="store is 'both'; it must be one of ids, vectors"):
        TargetConfig("v", str(llm_folder), store="both")


def test_a_flipped_bit_of_a_vector_is_noticed(root: Path, llm_folder: Path) -> None:
    targets.build(TargetConfig("v", str(llm_folder), store="vectors"), root)
    shard = root / "targets/v/part-0000000/shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # vectors are the last column of a sample
    shard.write_bytes(data)
    found = TargetSet(root, "v")
    found.rows_of(0)
    with pytest.raises(UserError, match=f"the bytes of utterance 'utt-{COUNT - 1}' are not those that were committed"):
        found.rows_of(COUNT - 1)


READER = """
import json, sys, types
sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
from streaming import StreamingDataset
found = [[s["id"], s["vectors"].shape, int(s["vectors"].astype("i8").sum())]
         for s in StreamingDataset(local=sys.argv[1], shuffle=False, batch_size=1)]
assert not [name for name in sys.modules if name.startswith("sm_train")]
print(json.dumps(found))
"""


def test_a_streaming_dataset_without_our_code_reads_the_vectors(root: Path, tmp_path: Path) -> None:
    folder = builders.llm(tmp_path / "llm", family="gemma3_text", dtype="bfloat16")
    targets.build(TargetConfig("v", str(folder), store="vectors"), root)
    env = {name: value for name, value in builders.child_env(TMPDIR=str(tmp_path)).items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", READER, str(root / "targets/v")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found, expected = TargetSet(root, "v"), []
    for row in range(COUNT):
        rows_LD = found.rows_RD[torch.from_numpy(found.rows_of(row))]
        total = int(rows_LD.view(torch.uint16).numpy().astype("i8").sum())
        expected.append([f"utt-{row}", list(rows_LD.shape), total])
    assert json.loads(done.stdout) == expected


def test_a_token_beyond_the_embedding_is_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    folder = builders.llm(tmp_path / "llm")
    made = builders.tokenizer(folder, None)
    made.add_tokens(["vieux"])
    made.add_special_tokens({"pad_token": "<pad>"})
    made.save_pretrained(folder)
    with pytest.raises(UserError, match=r"its tokenizer gives the id \d+ .* but its embedding has \d+ rows"):
        targets.build(TargetConfig("a", str(folder)), root)
    assert not list((root / "targets/a").glob("part-*"))


def test_vectors_of_a_type_that_mds_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = builders.llm(tmp_path / "llm", dtype="float64")
    with pytest.raises(UserError, match=r"vectors of torch.float64 cannot be stored; set store to ids"):
        PartWriter(tmp_path / "t", folder, None, "mms", "vectors")
    PartWriter(tmp_path / "t", folder, None, "mms", "ids")
