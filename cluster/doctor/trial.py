"""Memory by the formula, and one small batch forward and backward on the device of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster.doctor.findings import FAIL, OK, SKIP, WARN, Check, Finding
from cluster.doctor.machine import GIB, host_bytes
from cluster.doctor.work import Work
from cluster.fit import hub
from cluster.fit.memory import MARGIN
from cluster.fit.need import gpu_bytes, need, require_fits, sizes
from cluster.fit.shapes import llm_of, mapper_of, read_shape
from sm_train.data.audio import SAMPLE_RATE_HZ
from sm_train.data.lengths import FRAMES_PER_POSITION
from sm_train.errors import UserError
from sm_train.models.llm import load_model
from sm_train.models.mapper import SpeechMapper
from sm_train.models.speech import SpeechEncoder
from sm_train.train.engines.base import DTYPES

_ITEMS, _POSITIONS, _TOKENS = 2, 16, 24
_PROMPT_TOKENS = 300  # of the longest prompt with its speech, about
_LARGEST = 2 * 10**9  # bytes of weights that are read for a trial
_LLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def checks(work: Work) -> list[Check]:
    """Those that build models."""
    found = [Check("device", lambda: device(work))]
    if work.is_training:
        found += [Check("fit", lambda: fit(work)), Check("lanes", lambda: lanes(work))]
        return [*found, Check("trial", lambda: trial(work), 40.0)]
    if work.stage == "precompute":
        return [*found, Check("trial", lambda: encoder_trial(work), 40.0)]
    return [*found, Check("fit", lambda: fit_answers(work)), Check("trial", lambda: answer_trial(work), 40.0)]


def device(work: Work) -> Finding:
    """The device that a config asks for, and its precision there."""
    asked, gpu, engine = work.device_name, work.submit.gpu, getattr(work.cfg, "engine", None)
    has_gpu, precision = torch.cuda.is_available(), engine.precision if engine else ""
    if asked.startswith("cuda") and not has_gpu:
        remedy = "run this where the GPUs are (srun, torchrun), or set the device to cpu"
        is_elsewhere = work.submit.to != "local" or gpu
        return Finding(WARN if is_elsewhere else FAIL, "device", f"{asked} is asked for, and no GPU is here", remedy)
    is_old = gpu.startswith("V100") if gpu else has_gpu and torch.cuda.get_device_capability() < (8, 0)
    if precision == "bf16" and is_old:
        remedy = "engine.precision=fp16 engine.name=deepspeed"
        return Finding(WARN, "device", f"{gpu or 'the GPU here'} has no bf16 of its own, and is slow at it", remedy)
    if precision == "fp16" and (work.ranks.on_cpu or work.partitioned_by != "deepspeed"):
        text = f"fp16 on {'a CPU' if work.ranks.on_cpu else 'engine.name local, which does not scale the loss'}"
        return Finding(FAIL, "device", text, "engine.precision=bf16, or fp16 with engine.name=deepspeed on a GPU")
    return Finding(OK, "device", " ".join(filter(None, (gpu or str(work.device), precision))))


def lanes(work: Work) -> Finding:
    """Whether the ranks divide the lanes of a step."""
    count, ranks = work.cfg.batch.lanes, work.ranks.count
    text = f"batch.lanes {count} over {ranks} ranks ({work.submit.nodes} nodes of {work.submit.ranks_per_node})"
    if count % ranks:
        fitting = [str(n) for n in range(1, count + 1) if count % n == 0]
        return Finding(FAIL, "lanes", f"{text} do not divide", f"ask for {', '.join(fitting)} ranks, or other lanes")
    return Finding(OK, "lanes", f"{text}: {count // ranks} a rank and step")


def fit(work: Work) -> Iterator[Finding]:
    """Memory of a rank and of a node, by the formula."""
    ranks, (total, _) = work.ranks, host_bytes()
    room: str | float | None = None
    if not ranks.on_cpu:
        here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        room = work.submit.gpu or (float(here) if here else None)
    found = need(work.cfg, ranks)
    if not found.is_known:
        yield Finding(WARN, "fit", found.assumed[0], "name a local copy of the LLM: llm=FOLDER")
        return
    by = f"by the formula{', with ' + '; '.join(found.assumed) if found.assumed else ''}"
    of_device = f"a rank needs {sizes(found.device)}"
    if not ranks.on_cpu and room is None:
        remedy = "name the GPU as gpu=A100-80, or run this where the GPUs are"
        yield Finding(WARN, "fit", f"{of_device} {by}; no GPU is here to compare with", remedy)
        return
    judged = total if ranks.on_cpu or not work.submit.gpu else None  # of another machine's host nothing is known
    try:
        require_fits(work.cfg, room, ranks, judged)
    except UserError as error:
        text, _, remedy = str(error).rpartition("; ")
        yield Finding(FAIL, "fit", f"{text} ({by})", remedy)
        return
    host = f"; a node {sizes(found.host)} of host memory" if found.host else ""
    of = work.submit.gpu or f"{(total if room is None else float(room)) / GIB:.1f} GiB"
    yield Finding(OK, "fit", f"{of_device} of {of}{host}, {by}")


def fit_answers(work: Work) -> Finding:
    """Memory of an evaluation: the LLM's weights, and the keys and values of one batch."""
    cfg = work.cfg
    try:
        llm, _ = read_shape(cfg.llm.path, cfg.llm.revision)
    except UserError as error:
        return Finding(WARN, "fit", str(error), "name a local copy of the LLM: llm.path=FOLDER")
    size, tokens = (4 if cfg.llm.dtype == "float32" else 2), cfg.batch_size * (_PROMPT_TOKENS + cfg.max_new_tokens)
    kv_width = llm.attention_width // llm.heads * llm.kv_heads
    terms = {"llm_weights": float(size * llm.parameters), "keys_values": 2.0 * size * llm.layers * kv_width * tokens}
    gpus = torch.cuda.device_count() if cfg.llm.device_map else min(torch.cuda.device_count(), 1)
    if work.submit.gpu:
        room = gpu_bytes(work.submit.gpu) * (max(work.submit.gpus_per_node, 1) if cfg.llm.device_map else 1)
    elif gpus:
        room = float(sum(torch.cuda.get_device_properties(i).total_memory for i in range(gpus)))
    elif work.device_name.startswith("cuda"):
        return Finding(WARN, "fit", f"it needs {sizes(terms)}; no GPU is here to compare with", "name it: gpu=A100-80")
    else:
        room = host_bytes()[0]
    text = f"it needs {sizes(terms)} of {room / GIB:.1f} GiB"
    if sum(terms.values()) > MARGIN * room:
        return Finding(
            FAIL, "fit", text, "llm.dtype=bfloat16, llm.device_map=auto over several GPUs, or batch_size lower"
        )
    return Finding(OK, "fit", text)


def trial(work: Work) -> Iterator[Finding]:
    """The mapper of training, alone or with its LLM, forward and backward."""
    cfg, device, dtype = work.cfg, work.device, DTYPES[work.cfg.engine.precision]
    shape, unknown = mapper_of(cfg)
    if unknown:
        yield Finding(SKIP, "trial", unknown)
        return
    if 12 * shape.parameters > host_bytes()[1] / 2:
        yield Finding(SKIP, "trial", f"a mapper of {shape.parameters:,} parameters is too large for the memory here")
        return
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.float32
    torch.manual_seed(0)
    mapper = SpeechMapper(shape.cfg, shape.cfg.widths[0], shape.output_width).to(device, dtype).train()
    feats_BTE = torch.randn(_ITEMS, FRAMES_PER_POSITION * _POSITIONS, shape.cfg.widths[0], device=device)
    frames_B = torch.tensor([FRAMES_PER_POSITION * _POSITIONS, FRAMES_PER_POSITION * _POSITIONS - 5], device=device)
    begun = time.perf_counter()
    mapped_BPD = mapper(feats_BTE, frames_B)
    torch.autograd.backward(mapped_BPD.float().square().mean())
    yield _judged("trial", f"mapper of {shape.parameters:,} parameters on {device}, {dtype}", mapper, begun)
    if work.stage == "tune":
        mapper.zero_grad()
        yield _with_llm(cfg, mapper(feats_BTE, frames_B), mapper, device)


def _with_llm(cfg: Any, mapped_BPD: torch.Tensor, mapper: SpeechMapper, device: torch.device) -> Finding:
    """The frozen LLM on mapped positions: its loss must reach the mapper."""
    try:
        path, revision = llm_of(cfg)
    except UserError as error:
        return Finding(SKIP, "trial", str(error))
    llm, why = _read(path, revision, _LLM_DTYPES[cfg.engine.precision], device)
    if llm is None:
        return Finding(SKIP, "trial", why)
    begun, embed = time.perf_counter(), llm.get_input_embeddings()
    ids_BL = torch.arange(_ITEMS * _TOKENS, device=device).view(_ITEMS, _TOKENS) % embed.num_embeddings
    embeds_BLD = torch.cat([mapped_BPD.to(embed.weight.dtype), embed(ids_BL)], dim=1)
    logits_BLV = llm(inputs_embeds=embeds_BLD, use_cache=False, logits_to_keep=_TOKENS).logits
    loss = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten())
    torch.autograd.backward(loss)
    return _judged("trial", f"LLM {path} on {device}, its gradient at the mapper", mapper, begun)


def _judged(name: str, what: str, mapper: torch.nn.Module, begun: float) -> Finding:
    grads = [weight.grad for weight in mapper.parameters() if weight.grad is not None]
    norm = float(torch.stack([grad.float().square().sum() for grad in grads]).sum().sqrt()) if grads else 0.0
    took_s = time.perf_counter() - begun
    text = f"{what}: forward and backward in {took_s:.2f} s, gradient norm {norm:.2g}"
    if not 0 < norm < float("inf"):
        return Finding(
            FAIL, name, text, "not finite or zero: try engine.precision=fp32; a device that fails it is broken"
        )
    return Finding(OK, name, text)


def _read(path: str, revision: str | None, dtype: str, device: torch.device) -> tuple[Any, str]:
    """An LLM that is here and small; or None and why not."""
    folder = hub.folder_of(path, revision)
    if folder is None or hub.missing_weights(folder):
        return None, f"the LLM is not tried: {path} is not here"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > _LARGEST:
        return None, f"the LLM is not tried: {size / 1e9:.1f} GB of weights take too long to read"
    return load_model(str(folder), None, dtype).to(device), ""


def encoder_trial(work: Work) -> Finding:
    """The speech encoder on two seconds of noise."""
    cfg = work.cfg.encoder
    folder = hub.folder_of(cfg.path, cfg.revision)
    if folder is None or hub.missing_weights(folder):
        return Finding(SKIP, "trial", f"the encoder is not tried: {cfg.path} is not here")
    if (size := sum(file.stat().st_size for file in folder.glob("*.safetensors"))) > _LARGEST:
        return Finding(SKIP, "trial", f"the encoder is not tried: {size / 1e9:.1f} GB take too long to read")
    encoder, begun = SpeechEncoder(cfg), time.perf_counter()
    noise_S = np.random.default_rng(0).normal(scale=0.1, size=2 * SAMPLE_RATE_HZ).astype(np.float32)
    (feats_TE,) = encoder.encode_audio([noise_S])
    text = f"encoder {cfg.path}, layer {cfg.layer}, on {encoder.device}: 2 s of noise to {feats_TE.shape} in "
    text += f"{time.perf_counter() - begun:.2f} s"
    if not np.isfinite(feats_TE.astype(np.float16)).all():
        return Finding(FAIL, "trial", f"{text}, not finite in fp16", "set encoder.dtype=float32, or another layer")
    return Finding(OK, "trial", text)


def answer_trial(work: Work) -> Finding:
    """The LLM of an evaluation, two tokens."""
    cfg, device = work.cfg.llm, work.device
    llm, why = _read(cfg.path, cfg.revision, cfg.dtype, device)
    if llm is None:
        return Finding(SKIP, "trial", why)
    begun = time.perf_counter()
    with torch.inference_mode():
        logits_BLV = llm(torch.arange(_TOKENS, device=device)[None]).logits
    text = f"LLM {cfg.path} on {device}: {_TOKENS} tokens in {time.perf_counter() - begun:.2f} s"
    if not torch.isfinite(logits_BLV).all():
        return Finding(FAIL, "trial", f"{text}, its logits are not finite", "set llm.dtype=float32 or bfloat16")
    return Finding(OK, "trial", text)
