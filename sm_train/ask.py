"""Ask the LLM about a recording.

    python -m sm_train.ask RUN FILE.wav "PROMPT"

The encoder, the LLM and the mapper are those of the run; a prompt without {speech} is put behind the speech.
"""

from __future__ import annotations

from pathlib import Path

from sm_train import config
from sm_train.data import audio
from sm_train.data.mixing import Sources
from sm_train.errors import UserError, run_command
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.models.speech import EncoderConfig, SpeechEncoder
from sm_train.prompts import with_speech
from sm_train.scoring import mappers
from sm_train.scoring.systems import Heard, ask
from sm_train.train import checkpoint

USAGE = 'usage: python -m sm_train.ask RUN FILE.wav "PROMPT"'


def answer(run: Path, recording: Path, prompt: str, max_new_tokens: int = 150) -> tuple[str, str]:
    """What the mapper heard, as nearest tokens, and the LLM's answer.

    Raises:
        UserError: the run has no mapper, or one tuned with another chat template, or the recording cannot be used.
    """
    message = with_speech(prompt)
    trained = mappers.read(run, checkpoint.find(run))
    frozen = trained.contract
    settings = config.read_yaml(run / "config.yaml")
    try:
        samples_S = audio.load(recording)
    except audio.BadAudio as error:
        raise UserError(f"recording {recording}: {error.reason}: {error}") from None
    encoder = SpeechEncoder(
        EncoderConfig(frozen["encoder"], frozen["encoder_revision"], layer=frozen["layer"], pool=frozen["pool"])
    )
    audio.require_length(len(samples_S), encoder.shortest_samples, encoder.longest_samples, f"recording {recording}")
    llm = FrozenLlm(LlmConfig(frozen["llm"], frozen["llm_revision"]))
    trained.require_template(llm, "give the LLM that template again, or tune for this one")
    targets = Sources(settings["shards"], settings["target"]).targets
    mapped = trained.as_system(targets, settings.get("trim", mappers.TUNED_TRIM), llm.device)
    (feats_TE,) = encoder.encode_audio([samples_S])
    heard = Heard(feats_TE.astype("float16"), "")
    return mapped.transcript(heard) or "", ask(llm, [message], [mapped.vectors(heard)], max_new_tokens, mapped.adapter)[
        0
    ]


def main(argv: list[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if len(argv) != 3:
        raise UserError(USAGE)
    heard, said = answer(Path(argv[0]), Path(argv[1]), argv[2])
    print(f"heard:  {heard}\nanswer: {said}")


if __name__ == "__main__":
    run_command(main)
