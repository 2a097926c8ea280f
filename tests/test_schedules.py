import pytest

from m2t_accel.schedules import learning_rate, schedule, statistics_momentum, weight_momentum


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (5, 0.1000005),
        (10, 0.2),
        (55, 0.1),
        (100, 0.0),
    ],
)
def test_learning_rate_warms_up_and_falls_by_a_cosine(step, expected):
    assert learning_rate(step, 100, 10, 0.2) == pytest.approx(expected, abs=1e-15)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, 100, 0, 0.2) == 0.2


@pytest.mark.parametrize(("step", "expected"), [(0, 0.99), (25, 0.991464466094067), (50, 0.995), (100, 1.0)])
def test_weight_momentum_rises_to_one(step, expected):
    assert weight_momentum(step, 100, 0.99) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (25, 0.853553390593274), (50, 0.5), (100, 0.0)])
def test_statistics_momentum_falls_to_zero(step, expected):
    assert statistics_momentum(step, 100) == pytest.approx(expected, abs=1e-15)


def test_a_step_uses_its_own_rate_and_the_next_steps_weight_momentum():
    now = schedule(step=3, total_steps=8, warmup_steps=2, peak=0.5, base_momentum=0.9)
    assert now.learning_rate == learning_rate(3, 8, 2, 0.5)
    assert now.statistics_momentum == statistics_momentum(3, 8)
    assert now.weight_momentum == weight_momentum(4, 8, 0.9)


def test_after_the_last_step_the_teacher_stands_still():
    assert schedule(step=7, total_steps=8, warmup_steps=2, peak=0.5, base_momentum=0.9).weight_momentum == 1.0
