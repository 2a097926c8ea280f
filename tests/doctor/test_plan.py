import datetime
from types import SimpleNamespace

import pytest
import torch

from m2t_accel.config.recipes import RECIPES, build_config
from m2t_accel.doctor import plan
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD
from m2t_accel.doctor.speed import LoaderSpeed, StepSpeed


def marks(findings):
    return [finding.mark for finding in findings]


def recipe(name="digits", **others):
    return build_config({"recipe": name, "dataset": "digits", **others})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_it_is_has_no_doubtful_setting(name):
    config = recipe(name)
    found = [*plan.check_learning_rate(config), *plan.check_settings(config)]
    assert set(marks(found)) == {GOOD}


def test_a_learning_rate_a_hundred_times_too_high_is_bad_and_names_the_flag():
    (finding,) = plan.check_learning_rate(recipe(learning_rate_per_256=40.0))
    assert (finding.mark, "--learning_rate_per_256 0.4" in finding.text) == (BAD, True)
    (finding,) = plan.check_learning_rate(recipe("8x2080Ti-b256-100ep", learning_rate_per_256=5))
    assert (finding.mark, "--learning_rate_per_256 0.05" in finding.text) == (BAD, True)


@pytest.mark.parametrize(
    ("settings", "mark"),
    [
        ({"learning_rate_per_256": 0.1}, DOUBTFUL),
        ({"learning_rate_per_256": 0.01}, DOUBTFUL),
        ({"optimizer": "lars", "learning_rate_per_256": 0.4}, GOOD),
        ({"optimizer": "lars", "learning_rate_per_256": 0.05}, DOUBTFUL),
        ({"optimizer": "lars", "learning_rate_per_256": 20}, BAD),
    ],
)
def test_a_learning_rate_is_compared_with_the_published_ones_of_its_optimizer(settings, mark):
    (finding,) = plan.check_learning_rate(recipe("8x2080Ti-b256-100ep", **settings))
    assert finding.mark == mark
    assert ("--learning_rate_per_256" in finding.text) == (mark != GOOD)


@pytest.mark.parametrize(
    ("settings", "doubtful"),
    [
        ({"batch_size": 8192}, ["batch"]),
        ({"batch_size": 128}, ["batch"]),
        ({"device_batch_size": 8}, ["sub-batch"]),
        ({"epochs": 400}, ["length"]),
        ({"warmup_epochs": 0}, ["warm-up"]),
        ({"max_steps": 200}, ["length"]),
        ({"batch_size": 512, "epochs": 150}, []),
    ],
)
def test_settings_outside_of_the_published_ranges_are_doubtful(settings, doubtful):
    found = plan.check_settings(recipe("8x2080Ti-b256-100ep", **settings))
    assert [finding.name for finding in found if finding.mark == DOUBTFUL] == doubtful


def data_of(number, validation=True):
    return SimpleNamespace(train=range(number), validation=range(9) if validation else None, lacks=None)


STEP = StepSpeed(64, 10, 0.1, 0.12, 300.0, None, None, 1)


def test_the_time_is_the_sum_of_start_steps_and_evaluations():
    """80 epochs of 22 steps, kNN before the first epoch and after every eighth one."""
    config = recipe(epochs=80)
    course = plan.predict(config, data_of(1437), LoaderSpeed(1, 5000.0, 5000.0), STEP, 2.0, 8.0, 0)
    assert (course.steps, course.images, course.evaluations) == (1760, 112_640, 11)
    assert course.seconds == pytest.approx(8 + 1760 * 0.12 + 11 * 2)
    # A run that resumes after half of the steps.
    course = plan.predict(config, data_of(1437), LoaderSpeed(1, 5000.0, 5000.0), STEP, 2.0, 8.0, 880)
    assert course.seconds == pytest.approx(8 + 880 * 0.12 + 6 * 2)


def test_the_slower_of_loader_and_step_sets_the_time():
    course = plan.predict(
        recipe(epochs=80, evaluate_every=0), data_of(1437), LoaderSpeed(1, 64.0, 64.0), STEP, None, 0.0, 0
    )
    assert course.seconds == pytest.approx(1760)


def test_virtual_devices_take_turns():
    """8 sub-batches of 32 images on one process, measured on sub-batches of 16."""
    config = recipe("8x2080Ti-b256-100ep", evaluate_every=0)
    step = STEP._replace(size=16, seconds_with_wait=0.5)
    course = plan.predict(config, data_of(2560), LoaderSpeed(1, 1e6, 1e6), step, None, 0.0, 0)
    assert course.seconds == pytest.approx(100 * 10 * 8 * 2 * 0.5)


def test_the_end_is_a_date():
    now = datetime.datetime(2026, 11, 26, 23, 0)
    course = plan.Plan(10, 640, 2, 7200.0, 100.0, 1.0, 1.5)
    (finding,) = plan.check_time(recipe(), course, STEP, now)
    text = (
        "2 h 0 min: 10 steps, 640 images, 2 evaluations of 1.5 s; ends on 27 November 2026 at 01:00 if it starts now; "
    )
    assert finding == (GOOD, "time", f"{text}energy not measured (no power can be read here)")
    (finding,) = plan.check_time(recipe(), course._replace(seconds=1e13), STEP, now)
    assert (finding.mark, "--hours N" in finding.text) == (DOUBTFUL, True)


def test_cost_and_energy_are_told_if_they_are_known():
    course = plan.Plan(10, 640, 2, 7200.0, 100.0, 1.0, 1.5)
    assert [f.text for f in plan.check_cost(course, STEP._replace(watts=500.0), 20.0)] == [
        "40.00 at 20 an hour for all machines",
        "1.00 kWh at the 500 W measured here",
    ]
    assert list(plan.check_cost(course, STEP, None)) == []
    (time,) = plan.check_time(recipe(), course, STEP, datetime.datetime(2026, 1, 1))
    assert "energy not measured" in time.text


def test_without_the_gpus_of_the_recipe_their_time_is_not_guessed():
    here = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    (finding,) = plan.check_hardware(recipe("8x2080Ti-b256-100ep"), here)
    assert finding.mark == DOUBTFUL
    assert "60 h on 8 2080 Ti are published" in finding.text
    assert "neither their speed nor their memory could be measured" in finding.text
    assert list(plan.check_hardware(recipe(), here)) == []
