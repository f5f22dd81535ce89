"""What runs in COMET's own environment: reads segments, writes their scores. Imports nothing of this project.

Its text is handed to that environment's Python, so that this folder is not among the places it imports from.
"""

import hashlib
import json
import os
import sys
from importlib.metadata import version


def score(job):  # type: ignore[no-untyped-def]  # for any Python that COMET runs under
    """COMET's version, the checkpoint's hash, and a score for each segment."""
    from comet import download_model, load_from_checkpoint

    path = job["model"]
    if os.path.isdir(path):
        path = os.path.join(path, "checkpoints", "model.ckpt")
    elif not os.path.isfile(path):
        path = download_model(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    model, shown = load_from_checkpoint(path), sys.stderr.isatty()
    told = model.predict(job["segments"], batch_size=job["batch_size"], gpus=job["gpus"], progress_bar=shown)
    scores = [float(score) for score in told.scores]
    return {"version": version("unbabel-comet"), "hash": digest.hexdigest()[:16], "scores": scores}


def main(asked, told):  # type: ignore[no-untyped-def]
    """From one JSON file into another: what :func:`score` gives, or the error."""
    with open(asked, encoding="utf-8") as file:
        job = json.load(file)
    try:
        found = score(job)
    except Exception as error:
        found = {"error": type(error).__name__, "reason": str(error)}
    with open(told, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
