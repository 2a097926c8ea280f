"""Plant defects that a change could bring and that would spoil the learning: a named test must fail on each."""

import copy
import dataclasses
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import concatenate_datasets
from helpers import ROOT

import m2t_accel.pretrain  # noqa: F401 (for sys.modules, below)
from m2t_accel import model, momentum_norm, schedules, step
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data import sources, views
from m2t_accel.data.order import ShuffledOrder
from m2t_accel.evaluation import features, knn, linear, supervised
from m2t_accel.model import Student, Teacher
from m2t_accel.momentum_norm import MomentumBatchNorm
from m2t_accel.optim import LARS
from m2t_accel.run import completion
from m2t_accel.run.report import Report
from m2t_accel.step import TrainingStep

training = sys.modules["m2t_accel.pretrain"]  # the name m2t_accel.pretrain is the function


class Defect(NamedTuple):
    """A defect, the function that plants it by a `pytest.MonkeyPatch`, and the test that fails on it."""

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    test: str


DEFECTS: list[Defect] = []


def caught_by(test):
    """Add a function to the defects. Its name is the defect's."""

    def add(plant):
        DEFECTS.append(Defect(plant.__name__.replace("_", " "), plant, test))
        return plant

    return add


# Teacher's weights


def scale_follow(patch, changed):
    """Let the teacher follow by another weight momentum than the given one."""
    follow = Teacher.follow
    patch.setattr(
        Teacher, "follow", lambda self, student, weight_momentum: follow(self, student, changed(weight_momentum))
    )


@caught_by("test_model.py::test_the_teacher_follows_weights_and_not_statistics")
def teacher_not_updated(patch):
    scale_follow(patch, lambda weight_momentum: 1.0)


@caught_by("test_model.py::test_the_teacher_follows_weights_and_not_statistics")
def targets_of_the_student(patch):
    scale_follow(patch, lambda weight_momentum: 0.0)


@caught_by("test_model.py::test_the_teacher_follows_weights_and_not_statistics")
def shares_of_teacher_and_student_swapped(patch):
    scale_follow(patch, lambda weight_momentum: 1 - weight_momentum)


def reschedule(patch, name, changed):
    """Replace a schedule; `changed` takes the original one and then its arguments."""
    original = getattr(schedules, name)
    patch.setattr(schedules, name, lambda *arguments: changed(original, *arguments))


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def weight_momentum_one_step_late(patch):
    reschedule(patch, "weight_momentum", lambda original, step, *others: original(step - 1, *others))


@caught_by("test_schedules.py::test_after_the_last_step_the_teacher_stands_still")
def weight_momentum_constant(patch):
    reschedule(patch, "weight_momentum", lambda original, step, total_steps, base: base)


# Teacher's statistics


@caught_by("test_schedules.py::test_a_step_uses_its_own_rate_and_the_next_steps_weight_momentum")
def statistics_momentum_stuck_at_1(patch):
    reschedule(patch, "statistics_momentum", lambda original, *arguments: 1.0)


@caught_by("test_schedules.py::test_a_step_uses_its_own_rate_and_the_next_steps_weight_momentum")
def statistics_momentum_stuck_at_0(patch):
    reschedule(patch, "statistics_momentum", lambda original, *arguments: 0.0)


@caught_by("test_schedules.py::test_a_step_uses_its_own_rate_and_the_next_steps_weight_momentum")
def statistics_momentum_one_step_late(patch):
    reschedule(patch, "statistics_momentum", lambda original, step, *others: original(step - 1, *others))


@caught_by("test_schedules.py::test_a_step_uses_its_own_rate_and_the_next_steps_weight_momentum")
def shares_of_batch_and_history_swapped(patch):
    reschedule(patch, "statistics_momentum", lambda original, *arguments: 1 - original(*arguments))


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def statistics_committed_once_per_sub_batch(patch):
    patch.setattr(Teacher, "collect_statistics", Teacher.commit_statistics)


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def statistics_of_one_view_only(patch):
    def collect(layers):
        for layer in layers:
            layer.forwards = layer.forwards[-1:]
        original(layers)

    original = model.collect_statistics
    patch.setattr(model, "collect_statistics", collect)


@caught_by("test_momentum_norm.py::test_two_lazy_steps_equal_the_formula[0.3-shape0]")
def history_with_biased_variance(patch):
    def measure(self, input):
        found = original(self, input)
        mean, biased_var, _ = self.forwards.pop()
        self.forwards.append((mean, biased_var, 10**12))
        return found

    original = MomentumBatchNorm.measure
    patch.setattr(MomentumBatchNorm, "measure", measure)


@caught_by("test_momentum_norm.py::test_every_batch_norm_of_a_module_is_converted_with_its_weights")
def batch_norm_left_unconverted(patch):
    def convert(module, name, done, *others):
        if len(done) == 1 and isinstance(module, torch.nn.BatchNorm2d):  # the second of a network
            return done.setdefault(module, module)
        return original(module, name, done, *others)

    original = momentum_norm._convert
    patch.setattr(momentum_norm, "_convert", convert)


@caught_by("test_step.py::test_nothing_moves_before_the_update_and_then_everything_does")
def teacher_normalises_by_running_statistics(patch):
    def create(self, *arguments):
        original(self, *arguments)
        self.teacher_forward.eval()

    original = TrainingStep.__init__
    patch.setattr(TrainingStep, "__init__", create)


# Loss and gradient


@caught_by("test_step.py::test_each_prediction_meets_the_target_of_the_other_view")
def predictions_meet_targets_of_the_same_view(patch):
    forward = Teacher.forward
    patch.setattr(Teacher, "forward", lambda self, view_1, view_2: forward(self, view_1, view_2)[::-1])


@caught_by("test_step.py::test_each_prediction_meets_the_target_of_the_other_view")
def loss_averaged_over_the_views(patch):
    original = step.momentum_teacher_loss
    patch.setattr(step, "momentum_teacher_loss", lambda predictions, targets: original(predictions, targets) / 2)


@caught_by("test_model.py::test_outputs_are_unit_norm_and_each_is_of_its_own_view")
def outputs_not_normalised(patch):
    patch.setattr(model, "functional", SimpleNamespace(normalize=lambda output, dim: output))


@caught_by("test_step.py::test_each_prediction_meets_the_target_of_the_other_view")
def predictor_left_out(patch):
    def forward(self, *both):
        return [torch.nn.functional.normalize(self.projector(model.embed(self.encoder, view)), dim=1) for view in both]

    patch.setattr(Student, "forward", forward)


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def gradients_of_sub_batches_summed(patch):
    backward = Accelerator.backward
    patch.setattr(Accelerator, "backward", lambda self, loss: backward(self, loss * self.gradient_accumulation_steps))


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def gradients_not_reset(patch):
    patch.setattr(AcceleratedOptimizer, "zero_grad", lambda self, set_to_none=None: None)


# Optimizer and learning rate


def change_optimizer(patch, **changed):
    """Multiply settings of the optimizer."""

    def create(module, name, learning_rate, momentum, weight_decay, fused=True):
        given = {"momentum": momentum, "weight_decay": weight_decay}
        given |= {name: factor * given[name] for name, factor in changed.items()}
        return original(module, name, learning_rate, **given, fused=fused)

    original = training.create_optimizer
    patch.setattr(training, "create_optimizer", create)


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def weight_decay_left_out(patch):
    change_optimizer(patch, weight_decay=0)


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def weight_decay_ten_times_as_large(patch):
    change_optimizer(patch, weight_decay=10)


@caught_by("test_second_implementation.py::test_the_loop_equals_a_second_implementation[momentum]")
def optimizer_without_momentum(patch):
    change_optimizer(patch, momentum=0)


@caught_by("test_optim.py::test_lars_groups_and_frozen_parameters")
def lars_adapts_biases(patch):
    def add_param_group(self, group):
        original(self, {**group, "adapt": True})

    original = LARS.add_param_group
    patch.setattr(LARS, "add_param_group", add_param_group)


@caught_by("test_optim.py::test_lars_groups_and_frozen_parameters")
def lars_without_decay_of_biases(patch):
    def add_param_group(self, group):
        original(self, {**group, "weight_decay": group.get("weight_decay", 1e-6) * group.get("adapt", True)})

    original = LARS.add_param_group
    patch.setattr(LARS, "add_param_group", add_param_group)


@caught_by("config/test_recipes.py::test_a_published_recipe_has_the_published_settings_and_figures[8xV100-b1024-100ep]")
def learning_rate_not_scaled_by_the_batch(patch):
    patch.setattr(PretrainConfig, "learning_rate", property(lambda self: self.learning_rate_per_256))


@caught_by("test_schedules.py::test_a_step_uses_its_own_rate_and_the_next_steps_weight_momentum")
def learning_rate_one_step_late(patch):
    reschedule(patch, "learning_rate", lambda original, step, *others: original(max(step - 1, 0), *others))


@caught_by("config/test_pretrain.py::test_the_warmup_is_counted_in_epochs")
def warmup_in_steps_instead_of_epochs(patch):
    def schedule(self, step, steps_per_epoch):
        in_steps = dataclasses.replace(self, warmup_epochs=self.warmup_epochs / steps_per_epoch)
        return original(in_steps, step, steps_per_epoch)

    original = PretrainConfig.schedule
    patch.setattr(PretrainConfig, "schedule", schedule)


# Images


@caught_by("data/test_order.py::test_the_order_is_the_same_with_every_release_of_this_package_and_of_numpy")
def same_order_in_every_epoch(patch):
    original = ShuffledOrder.sub_batch
    patch.setattr(ShuffledOrder, "sub_batch", lambda self, epoch, index: original(self, 0, index))


@caught_by("data/test_order.py::test_the_order_is_the_same_with_every_release_of_this_package_and_of_numpy")
def images_not_shuffled(patch):
    def sub_batch(self, epoch, index):
        return np.arange(index * self.size, (index + 1) * self.size)

    patch.setattr(ShuffledOrder, "sub_batch", sub_batch)


def redraw(patch, changed):
    """Draw the random numbers of other views than the given ones."""
    original = views.draw_uniforms
    patch.setattr(views, "draw_uniforms", lambda *arguments: original(*changed(*arguments)))


@caught_by("data/test_views.py::test_each_view_has_the_crop_and_the_colours_of_its_own_random_numbers")
def one_crop_for_both_views(patch):
    redraw(patch, lambda seed, epoch, samples, view: (seed, epoch, samples, 0))


@caught_by("data/test_views.py::test_each_view_has_the_crop_and_the_colours_of_its_own_random_numbers")
def same_views_in_every_epoch(patch):
    redraw(patch, lambda seed, epoch, samples, view: (seed, 0, samples, view))


@caught_by("data/test_views.py::test_each_view_has_the_crop_and_the_colours_of_its_own_random_numbers")
def same_colours_for_both_views(patch):
    original = views.TwoViews.parameters
    patch.setattr(views.TwoViews, "parameters", lambda self, uniforms: original(self, uniforms[[0, 0]]))


@caught_by("data/test_views.py::test_each_view_has_the_crop_and_the_colours_of_its_own_random_numbers")
def colours_of_view_1_for_both_views(patch):
    def parameters(self, uniforms):
        numbers = uniforms.reshape(-1, uniforms.shape[-1])
        return views.photometry_parameters(numbers, np.zeros(len(numbers), int), self.config)

    patch.setattr(views.TwoViews, "parameters", parameters)


# What a run leaves


@caught_by("test_pretrain.py::test_the_encoder_of_a_run_is_the_teachers_and_has_the_accuracy_of_the_last_step")
def published_encoder_of_the_student(patch):
    original = completion.plain_encoder
    patch.setattr(completion, "plain_encoder", lambda teachers, students: original(students, students))


@caught_by("test_pretrain.py::test_the_encoder_of_a_run_is_the_teachers_and_has_the_accuracy_of_the_last_step")
def knn_of_the_student(patch):
    def create(self, config, accelerator, folder, data, step, *others):
        original(self, config, accelerator, folder, data, step, *others)
        write = self.write_if_due
        self.write_if_due = lambda encoder, *others: write(step.student.encoder, *others)

    original = Report.__init__
    patch.setattr(Report, "__init__", create)


# Evaluation


@caught_by("evaluation/test_knn.py::test_an_evaluation_writes_its_result_once")
def query_images_in_the_bank(patch):
    def measure(encoder, bank, queries, *others):
        return original(encoder, concatenate_datasets([bank, queries]), queries, *others)

    original = knn.measure_knn
    patch.setattr(knn, "measure_knn", measure)


@caught_by("data/test_held_out.py::test_the_choice_of_held_out_images_never_changes")
def held_out_images_trained_on(patch):
    def hold_out(train, validation, config):
        _, _, validation = original(train, validation, config)
        return train, train, validation

    original = sources.hold_out_images
    patch.setattr(sources, "hold_out_images", hold_out)


@caught_by("evaluation/test_features.py::test_features_are_in_the_order_of_the_images_and_broken_images_are_left_out")
def labels_of_the_bank_shifted(patch):
    original = knn.read_labels
    patch.setattr(knn, "read_labels", lambda images: np.roll(original(images), 1))


@caught_by("evaluation/test_knn.py::test_the_vote_equals_one_by_hand")
def neighbours_by_dot_product(patch):
    patch.setattr(knn, "functional", SimpleNamespace(normalize=lambda rows, dim: rows))


class RandomCrops(views.CentralViews):
    """Evaluation views that are cut like those of training."""

    def __getitems__(self, request):
        batch = super().__getitems__(request)
        crops = views.FlippedCrops(self.images, self.config).__getitems__(request._replace(buffer=None)).crops
        batch.crops.copy_(crops)
        return batch


@caught_by("evaluation/test_linear.py::test_an_interrupted_probe_resumes_to_the_same_bits[cached]")
def probe_tested_on_training_crops(patch):
    def embed_images(*arguments, **options):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(features, "CentralViews", RandomCrops)
            yield from original(*arguments, **options)

    original = supervised.embed_images
    patch.setattr(supervised, "embed_images", embed_images)


@caught_by("evaluation/test_linear.py::test_a_linear_probe_equals_a_second_implementation")
def labels_of_the_probe_shifted(patch):
    original = linear.read_labels
    patch.setattr(linear, "read_labels", lambda images: np.roll(original(images), 1))


@caught_by("evaluation/test_linear.py::test_a_linear_probe_equals_a_second_implementation")
def probe_trained_on_batch_statistics(patch):
    def create(self, evaluation, train):
        original(self, evaluation._replace(encoder=copy.deepcopy(evaluation.encoder).train()), train)

    original = linear.AugmentedFeatures.__init__
    patch.setattr(linear.AugmentedFeatures, "__init__", create)


@caught_by("evaluation/test_linear.py::test_an_interrupted_probe_resumes_to_the_same_bits[augmented]")
def evaluation_images_not_normalised(patch):
    def evaluation_view(crops, config):
        return original(crops, dataclasses.replace(config, image_mean=(0, 0, 0), image_std=(1, 1, 1)))

    original = features.evaluation_view
    patch.setattr(features, "evaluation_view", evaluation_view)


class Session:
    """A plugin that plants a defect after the tests are imported, and keeps the errors that they raise."""

    def __init__(self, defect, patch):
        self.defect, self.patch, self.errors = defect, patch, []

    def pytest_collection_finish(self):
        self.defect.plant(self.patch)

    def pytest_exception_interact(self, call):
        self.errors.append(call.excinfo.value)


# Plugins that would slow the session within the session, or that two sessions cannot share.
WITHOUT = ("xdist", "cacheprovider", "faulthandler", "unraisableexception", "threadexception")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_planted_defect_is_caught(defect, tmp_path, monkeypatch):
    """The same test passes without the defect: it is part of this suite."""
    session = Session(defect, monkeypatch)
    options = [word for name in WITHOUT for word in ("-p", f"no:{name}")]
    pytest.main([f"{ROOT}/tests/{defect.test}", f"--basetemp={tmp_path}/nested", "-q", *options], [session])
    assert session.errors, f"{defect.test} passes with the defect"
    for error in session.errors:
        assert isinstance(error, AssertionError | pytest.fail.Exception), f"{defect.test} broke: {error!r}"


def test_the_table_in_the_docs_lists_these_defects_and_tests():
    _, _, table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("| defect |")
    rows = [line.split(" | ")[:2] for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert rows == [[f"| {defect.name}", f"`{defect.test}`"] for defect in DEFECTS]
