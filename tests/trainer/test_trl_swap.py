"""The same script with TRL's two names and with ours, and a plain loop; each in a fresh process, offline."""

import subprocess
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerState

from tests.support.paths import EXAMPLES
from tests.support.processes import environment, limit
from tests.support.tiny import tiny_llava

OURS = "from seecal import CALConfig, CALTrainer"


def run(script, *arguments, cwd):
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(EXAMPLES), capture_output=True, text=True, timeout=limit(4))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def history(folder):
    state = TrainerState.load_from_json(str(folder / "checkpoint-10" / "trainer_state.json"))
    train = [one for one in state.log_history if "loss" in one]
    evaluation = [one for one in state.log_history if "eval_loss" in one]
    return train, evaluation


def test_only_the_two_names_differ(tmp_path):
    script = (EXAMPLES / "trl_swap.py").read_text()
    assert script.count(OURS) == 1
    before = tmp_path / "before.py"
    before.write_text(
        script.replace(OURS, "from trl import SFTConfig, SFTTrainer")
        .replace("CALConfig(", "SFTConfig(")
        .replace("CALTrainer(", "SFTTrainer(")
    )
    run(before, "tiny", "sft", cwd=tmp_path)
    run(EXAMPLES / "trl_swap.py", "tiny", "cal", cwd=tmp_path)

    start = tiny_llava().state_dict()
    for folder in ("sft", "cal"):
        train, evaluation = history(tmp_path / folder)
        assert train[-1]["loss"] < train[0]["loss"] - 0.5, folder
        assert evaluation[-1]["eval_loss"] < evaluation[0]["eval_loss"], folder
        # What was saved is a plain transformers model that loads alone.
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / folder)
        assert "forward" not in vars(model)
        assert max((one - start[name]).abs().max() for name, one in model.state_dict().items()) > 1e-3, folder
        assert AutoProcessor.from_pretrained(tmp_path / folder).chat_template
    ours, theirs = history(tmp_path / "cal"), history(tmp_path / "sft")
    metrics = {"cross_entropy", "delta_mean", "share_at_alpha", "share_inside", "share_at_beta", "label_tokens"}
    assert metrics | {"tokens_per_second", "contrast_token_share", "num_tokens", "grad_norm"} <= set(ours[0][-1])
    assert {name for name in theirs[1][-1] if name.startswith("eval_")} <= set(ours[1][-1]), "TRL's evaluation metrics"


def test_plain_loop(tmp_path):
    lines = run(EXAMPLES / "plain_loop.py", "10", cwd=tmp_path).splitlines()
    losses = [float(line.split("CAL loss ")[1].split()[0]) for line in lines if "CAL loss" in line]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    assert lines[-1].startswith("plain loss")
