"""The search through design spaces, in one process: what is compared is what was trained, failures and early stops are
recorded, the base model stays as it was, and a search goes on where it stood. Checked against runs by hand."""

import csv
import dataclasses
import gc
import math
import tracemalloc
import weakref
from contextlib import nullcontext
from functools import partial
from statistics import mean

import optuna
import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_peft_ext import ComposedConfig
from hf_peft_ext.search import LowestShare, SearchTask, share_trunk
from hf_peft_ext.search.fingerprint import metric_fingerprint
from hf_peft_ext.search.result import scores_of
from hf_peft_ext.search.training import RunArguments, adapted, evaluate, train_adapter

from .search_spaces import ARGS, N_MODELS, TwoStages, accuracy, lora, search, tiny_tasks


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole search, and where it lies."""
    file = tmp_path_factory.mktemp("search") / "search.db"
    return search(file).search(), file


def test_goes_through_the_stages(finished):
    result, _ = finished
    assert [decision.stage for decision in result.decisions] == ["S1", "S2"]
    assert len(result.records) == 2 * 2 * N_MODELS
    for decision in result.decisions:
        scores = result.scores(decision.stage)
        assert decision.means == pytest.approx({name: mean(found) for name, found in scores.items()})
        assert decision.means[decision.winner] == max(decision.means.values())
        assert decision.runs == dict.fromkeys(scores, N_MODELS)
        assert decision.tie == (decision.p_value is None or decision.p_value >= 0.05)
    layer = ["first", "last"].index(result.decisions[0].winner)
    assert all(r.run.config["placements"][0]["layers"] == [layer] for r in result.of("S2"))


def test_what_was_found_is_a_config(finished):
    """The config of the last space, for peft."""
    result, _ = finished
    layer, size = (decision.winner for decision in result.decisions)
    assert result.config.to_placements() == lora(layer, size, 0).placements
    assert isinstance(get_peft_model(tiny_tasks()["two"].model, result.config), PeftModel)


def test_scores_are_those_of_a_run_by_hand(finished):
    """The score of a trial is the one of the same config on a model that was made for it alone."""
    result, _ = finished
    for record in (result.records[0], result.records[-1]):
        placements = record.run.config["placements"]
        for name in ("two", "three"):
            task = tiny_tasks()[name]
            torch.manual_seed(record.run.seed)
            model = get_peft_model(task.model, ComposedConfig(task_type="SEQ_CLS", placements=placements))
            train_adapter(model, task.batches("train", 8), ARGS, record.run.seed)
            assert evaluate(model, task.batches("evaluation", 16), ARGS, accuracy) == record.scores[name]
            assert record.parameters == sum(p.numel() for n, p in model.named_parameters() if "sublayer_" in n)


def test_goes_on_where_it_stood(finished):
    """A finished search, started again, trains nothing and says the same; other settings are refused."""
    result, file = finished
    tasks = tiny_tasks()
    again = search(file, tasks)
    for task in tasks.values():
        task.train = []  # would fail
    again = again.search()
    assert again.records == result.records
    assert again.decisions == result.decisions
    with pytest.raises(ValueError, match=r"`n_models` \(=7\) is 2 in the study 's4'; choose another `study_name`\."):
        search(file, n_models=7)


def test_other_data_and_spaces_are_refused(finished):
    """What the study holds would be counted as theirs."""
    _, file = finished
    tasks = tiny_tasks()
    tasks["two"].train[0]["labels"] = 1
    with pytest.raises(ValueError, match=r"^`rows` \(=.*'two'.*\) is .* in the study 's4'; choose another"):
        search(file, tasks)

    class Wider(TwoStages):
        def sample(self, constraint, n, seed=0):
            return [lora("last", "large", i) for i in range(n)]

    with pytest.raises(ValueError, match=r"^`study_name` \(='s4'\) has other models of 'S1', 'first' than this space"):
        search(file, space=Wider()).search()


def test_lowest_share():
    """The lowest quarter of a stage at an epoch, by hand; other stages and epochs do not count."""

    def trial(stage, values, state=optuna.trial.TrialState.COMPLETE):
        attrs = {"run": {"stage": stage}}
        options = {"user_attrs": attrs, "intermediate_values": values}
        return optuna.create_trial(state=state, value=0.0 if state.is_finished() else None, **options)

    study, pruner = optuna.create_study(direction="maximize"), LowestShare(0.25, n_startup_runs=4)
    for score in (0.1, 0.2, 0.3):
        study.add_trial(trial("S1", {1: 0.9, 2: score}))
    for score in (0.5, 0.6):
        study.add_trial(trial("S0", {2: score}))

    def stops(stage, score):  # a high first task is no excuse
        return pruner.prune(study, trial(stage, {1: 0.99, 2: score}, optuna.trial.TrialState.RUNNING))

    assert not stops("S1", 0.0)  # the first ones are never stopped
    study.add_trial(trial("S1", {2: 0.4}))
    assert stops("S1", 0.17)
    assert not stops("S1", 0.18)  # a quarter of 0.1, 0.2, 0.3, 0.4 lies below 0.175
    assert not stops("S0", 0.0)


def test_base_model_stays(tmp_path):
    """After all runs no weight, module or hook of the base model is another, heads included."""
    tasks = tiny_tasks()
    models = [task.model for task in tasks.values()]
    assert models[0].bert is models[1].bert
    states = [{name: x.clone() for name, x in model.state_dict().items()} for model in models]
    modules = [dict(model.named_modules()) for model in models]
    search(tmp_path / "search.db", tasks).search()
    for model, state, before in zip(models, states, modules, strict=True):
        after = model.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], state[name]) for name in state)
        assert dict(model.named_modules()) == before
        assert hooks(model) == 0
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("config", [lora("first", "small", 0), LoraConfig(task_type="SEQ_CLS")])
def test_nothing_of_an_adapter_is_left(config):
    """After it was swapped out, its tensors are gone, and the model has the modules and hooks that it had."""
    model, left = tiny_tasks()["two"].model, []
    modules = list(model.modules())
    for seed in range(3):
        with adapted(model, config, seed) as adapted_model:
            ids = torch.ones(2, 4, dtype=torch.long)
            adapted_model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
            left += [weakref.ref(p) for p in adapted_model.parameters() if p.requires_grad]
        del adapted_model
        assert list(model.modules()) == modules
        assert hooks(model) == 0
    gc.collect()
    assert not any(reference() is not None for reference in left)


@pytest.mark.slow
def test_memory_is_flat_over_200_runs(tmp_path):
    """Python's own memory and the process's: what the last 100 runs add to what 100 took."""
    tasks, sizes = tiny_tasks(), []

    class Watched(TwoStages):
        finished = property(lambda self: len(self.winners) == 1)

        def constraints(self):
            return ["first"]

        def config(self):
            return lora("first", 0)

    def metric(evaluated):
        sizes.append((tracemalloc.get_traced_memory()[0], psutil.Process().memory_info().rss))
        return 0.5

    for task in tasks.values():
        task.compute_metrics = metric
    tracemalloc.start()
    try:
        result = search(tmp_path / "search.db", tasks, Watched(), n_models=200).search()
    finally:
        tracemalloc.stop()
    assert len(result.records) == 200
    (traced, rss), (traced_later, rss_later) = sizes[200], sizes[399]
    assert traced_later - traced < 1.5 * 2**20  # the records of 100 runs
    assert rss_later - rss < 8 * 2**20


def test_failures_are_recorded(tmp_path):
    """A run that fails says why, and the others go on; a score that is no number is a failure."""

    class Failing(TwoStages):
        def sample(self, constraint, n, seed=0):
            configs = super().sample(constraint, n, seed)
            if not self.winners:
                configs[1].placements[0].layers = [7]
            return configs

    result = search(tmp_path / "search.db", space=Failing()).search()
    failed = [record for record in result.records if record.state == "failed"]
    assert {(r.run.stage, r.run.model) for r in failed} == {("S1", 1)}
    assert all("`layers`" in record.error and "7" in record.error for record in failed)
    assert result.decisions[0].failed == {"first": 1, "last": 1}
    assert result.decisions[0].runs == {"first": 1, "last": 1}

    hopeless = search(tmp_path / "nan.db", tiny_tasks(lambda evaluated: float("nan")))
    with pytest.raises(
        RuntimeError, match=r"No run of stage 'S1' was finished; the first error: ValueError: The score"
    ):
        hopeless.search()


def test_stops_hopeless_runs(tmp_path):
    """A pruner sees each task's scores; what it stops has no further tasks, and counts with what it had."""

    class LaterModels(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.user_attrs["run"]["model"] > 0 and trial.last_step == 2

    result = search(tmp_path / "search.db", pruner=LaterModels()).search()
    assert {r.run.model for r in result.records if r.state == "stopped"} == {1}
    stopped = next(r for r in result.records if r.state == "stopped")
    assert list(stopped.scores) == ["two", "three"]  # the second at the epoch at which it was stopped
    assert result.decisions[0].runs == {"first": N_MODELS, "last": N_MODELS}


def test_a_stopped_model_counts_as_it_lay(finished):
    """By hand: 0.1 behind the mean of the others on the task that it has, so as much behind on the other."""
    result, _ = finished
    first, second, third = result.of("S1")[:3]  # two constraints, model by model
    done = [replaced(first, {"two": 0.5, "three": 0.3}), replaced(second, {"two": 0.7, "three": 0.5})]
    stopped = replaced(third, {"two": 0.5}, state="stopped")
    found = scores_of([*done, stopped], ["two", "three"])
    assert found[third.run.constraint][-1] == pytest.approx((0.5 + 0.3) / 2)


def replaced(record, scores, state="done"):
    return dataclasses.replace(record, scores=scores, state=state)


def test_scores_by_the_loss(tmp_path):
    """Without a metric, the best model is the one with the lowest loss."""
    result = search(tmp_path / "search.db", tiny_tasks(None), n_models=1).search()
    assert all(score < 0 for record in result.records for score in record.scores.values())


def test_csv(finished, tmp_path):
    result, _ = finished
    with result.to_csv(tmp_path / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.records)
    assert {row["state"] for row in rows} == {"done"}
    for row in rows:
        assert float(row["score"]) == pytest.approx((float(row["two"]) + float(row["three"])) / 2)


def test_errors(tmp_path):
    tasks = tiny_tasks()
    with pytest.raises(ValueError, match=r"`train` \(=\[\]\) must hold rows\."):
        SearchTask(tasks["two"].model, [], [{}])
    with pytest.raises(ValueError, match=r"`learning_rate` \(=0\) must be a positive number\."):
        RunArguments(learning_rate=0)
    with pytest.raises(ValueError, match=r"`warmup_ratio` \(=1\.5\) must lie in \[0, 1\)\."):
        RunArguments(warmup_ratio=1.5)
    with pytest.raises(ValueError, match=r"`lr_scheduler_type` \(='linaer'\) must be one of linear, cosine"):
        RunArguments(lr_scheduler_type="linaer")
    with pytest.raises(ValueError, match=r"`storage` \(='search.db'\) must be a database's URL"):
        search("search.db", storage="search.db")
    with pytest.raises(ValueError, match=r"`storage` \(='sqlite:///.*'\) must be in an existing folder"):
        search(tmp_path / "none" / "search.db")
    with pytest.raises(ValueError, match=r"`n_models` \(=0\) must be a positive whole number\."):
        search(tmp_path / "search.db", n_models=0)
    with pytest.raises(ValueError, match=r"`storage` \(='sqlite://'\) must name a file"):
        search("sqlite://")
    gpt2 = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=4))
    with pytest.raises(ValueError, match=r"`models` \(='GPT2For.*'\) must have the trunk of the first, BertFor"):
        share_trunk({"a": tasks["two"].model, "b": gpt2})


# Models and metrics of another search


def recall(evaluated):
    return {"recall": 1.0}


def other_weights(task):
    with torch.no_grad():
        task.model.bert.encoder.layer[1].output.dense.weight[-1, -1] += 1e-3


def other_head(task):
    with torch.no_grad():
        task.model.classifier.weight += 1


def other_config(task):
    task.model.config.hidden_dropout_prob = 0.5


def other_metric(task):
    task.compute_metrics = recall


def no_metric(task):
    task.compute_metrics = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, r"^`weights` \(='\w{12}'\) of the task 'two' is not that of the study 's4'; choose another"),
        (other_config, r"^`config` \(=\{'hidden_dropout_prob': 0.5\}\) of the task 'two' is not that of the study"),
        (other_metric, r"^`compute_metrics` \(='recall \w{8}'\) of the task 'two' is not that of the study 's4'"),
        (no_metric, r"^`compute_metrics` \(=None\) of the task 'two' is not that of the study 's4'"),
    ],
)
def test_another_model_or_metric_is_refused(change, message, finished):
    """Before anything runs; the name of the model is the same."""
    _, file = finished
    tasks = tiny_tasks()
    change(tasks["two"])
    with pytest.raises(ValueError, match=message):
        search(file, tasks)


def test_a_head_may_start_anew(finished):
    """A classifier is drawn at random when a model is loaded, and search trains it anew in each run."""
    result, file = finished
    tasks = tiny_tasks()
    other_head(tasks["two"])
    assert search(file, tasks).search().records == result.records


def test_metrics_are_told_apart():
    """By what they do and what they are given, not by where they lie in memory."""

    def over(threshold):
        return lambda evaluated: float((evaluated.predictions > threshold).mean())

    class Share:
        def __init__(self, of):
            self.of = of

        def __call__(self, evaluated):
            return self.of

    makers = (
        lambda: accuracy, lambda: recall, lambda: over(1), lambda: over(2), lambda: Share(1), lambda: Share(2),
        lambda: Share(1).__call__, lambda: partial(over(1), 3), lambda: partial(over(1), 4), lambda: torch.mean,
        lambda: (lambda evaluated: 1.0), lambda: (lambda evaluated: 2.0), lambda: None,
    )  # fmt: skip
    found = [metric_fingerprint(make()) for make in makers]
    assert len(set(found)) == len(found)
    assert found == [metric_fingerprint(make()) for make in makers]
    assert not [name for name in found if name and " at 0x" in name]


@pytest.mark.parametrize("metric", [accuracy, None], ids=["accuracy", "loss"])
def test_a_loss_that_is_not_finite_is_a_failure(metric, tmp_path):
    """argmax takes NaN for an answer, and the accuracy looks like one."""
    tasks = tiny_tasks(metric)
    with torch.no_grad():
        tasks["three"].model.classifier.weight.fill_(float("nan"))
    with pytest.raises(
        RuntimeError, match=r"No run of stage 'S1' was finished; the first error: ValueError: A loss of"
    ):
        search(tmp_path / "search.db", tasks).search()
    model = tasks["three"].model
    with pytest.raises(ValueError, match=r"outputs are not numbers") if metric else nullcontext():
        assert math.isnan(evaluate(model, tasks["three"].batches("evaluation", 8), ARGS, metric))
