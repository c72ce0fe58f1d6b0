"""What CAL keeps on a model between two trainings."""

from seecal.core.state import CALState


def test_after_a_trainer_a_plain_loop_counts_its_own_steps_from_the_start():
    """contrast_every would otherwise see the trainer's last step for ever, and contrast always or never."""
    state = CALState()
    assert [state.next_step() for _ in range(3)] == [0, 1, 2]
    state.step = 7
    assert [state.next_step() for _ in range(2)] == [7, 7], "the micro-batches of a step are one step"
    state.forget_steps()
    assert [state.next_step() for _ in range(3)] == [0, 1, 2]
