"""A model that fails on purpose: how often, how, reproducibly, and not at all when it is off."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlchaos_dagster import ChaosConfig, ChaosModelWrapper
from mlchaos_dagster.chaos_model import ChaosCounts, ChaosError

pytestmark = pytest.mark.req("R2-05")

CALLS = 20_000
ALWAYS_WRONG = ChaosConfig(exceptions=0, timeouts=0, wrong=1, seed=3)
RNG = np.random.default_rng(1)
ROWS = RNG.normal(size=(200, 3))


class Steady:
    """Answers what it was given: a pyfunc-like model with a signature of its own, and a call."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.version = "7"

    def predict(self, context: Any = None, model_input: Any = None, params: Any = None) -> Any:
        """The answer, or the input."""
        return model_input if self.answer is None else self.answer

    def __call__(self, x: Any) -> Any:
        return x


class Params:
    def predict(self, model_input: Any, params: dict[str, float] | None = None) -> Any:
        return np.asarray(model_input) * (params or {}).get("factor", 1.0)


def outcome(call: Callable[[], Any], right: Any = 0) -> str:
    try:
        return "right" if call() == right else "wrong"
    except ChaosError:
        return "exception"
    except TimeoutError:
        return "timeout"


def outcomes(config: ChaosConfig, calls: int) -> list[str]:
    wrapper = ChaosModelWrapper(Steady(0), config)
    return [outcome(wrapper.predict) for _ in range(calls)]


def classifier() -> GaussianNB:
    labels = np.array(["deny", "grant", "postpone"])[(ROWS[:, 0] > 0).astype(int) + (ROWS[:, 1] > 1)]
    return GaussianNB().fit(ROWS, labels)


# ---- how often


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ChaosConfig(timeout_s=0, seed=11), (0.05, 0.02, 0.01)),
        (ChaosConfig(timeout_s=0, seed=12, failure_rate=0.4), (0.25, 0.1, 0.05)),
        (ChaosConfig.from_env({"CHAOS_ENABLED": "1"}, ChaosConfig(timeout_s=0, wrong=0)), (0.05, 0.02, 0.0)),
    ],
)
def test_each_failure_is_as_frequent_as_declared(config: ChaosConfig, expected: tuple[float, ...]) -> None:
    seen = Counter(outcomes(config, CALLS))
    for name, share in zip(("exception", "timeout", "wrong"), expected, strict=True):
        low, high = binomtest(seen[name], CALLS).proportion_ci(0.999, "exact")
        assert low <= share <= high, f"{name}: {seen[name]} of {CALLS}, declared {share}"


def test_what_is_counted_is_what_callers_saw() -> None:
    wrapper = ChaosModelWrapper(Steady(0), ChaosConfig(timeout_s=0, failure_rate=0.5))
    seen = Counter(outcome(wrapper.predict) for _ in range(1000))
    assert wrapper.counts == ChaosCounts(1000, seen["exception"], seen["timeout"], seen["wrong"], 0)


def test_a_timeout_takes_its_time_before_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("mlchaos_dagster.chaos_model.time.sleep", slept.append)
    wrapper = ChaosModelWrapper(Steady(0), ChaosConfig(exceptions=0, timeouts=1, wrong=0, timeout_s=1.5))
    with pytest.raises(TimeoutError, match=r"after 1\.5 s \(call 0\)"):
        wrapper.predict()
    assert slept == [1.5]


# ---- reproducibly


def test_the_seed_decides_and_another_one_decides_otherwise() -> None:
    config = ChaosConfig(timeout_s=0, failure_rate=0.3, seed=5)
    first = outcomes(config, 2000)
    assert first == outcomes(config, 2000)
    other = outcomes(ChaosConfig(timeout_s=0, failure_rate=0.3, seed=6), 2000)
    # Independent seeds agree where both are right (0.7²) or fail alike: about half of the calls.
    assert 0.45 < np.mean([a == b for a, b in zip(first, other, strict=True)]) < 0.62


def test_a_call_does_not_depend_on_the_calls_before() -> None:
    config = ChaosConfig(timeout_s=0, failure_rate=0.5, seed=9)
    whole = outcomes(config, 300)
    mixed = ChaosModelWrapper(classifier(), config)
    rows = ROWS[:1]
    right = mixed.model.predict(rows)[0]
    for n, expected in enumerate(whole):
        if n % 3:
            assert outcome(lambda: mixed.predict(rows)[0], right) == expected
        else:
            got = outcome(
                lambda: mixed.predict_proba(rows).round(9).tolist(), mixed.model.predict_proba(rows).round(9).tolist()
            )
            assert got == expected


class Interrupted(int):
    """A number that lets other threads run while it is counted up: without a lock two calls get one number."""

    def __add__(self, other: int) -> Interrupted:
        time.sleep(0)
        return Interrupted(int(self) + other)


def test_threads_share_the_very_same_outcomes() -> None:
    config = ChaosConfig(timeout_s=0, failure_rate=0.4, seed=21)
    wrapper = ChaosModelWrapper(Steady(0), config)
    wrapper._calls = Interrupted(0)
    seen: list[Counter[str]] = [Counter() for _ in range(8)]
    ready = threading.Barrier(8)

    def work(mine: Counter[str]) -> None:
        ready.wait()
        for _ in range(500):
            mine[outcome(wrapper.predict)] += 1

    threads = [threading.Thread(target=work, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(seen, Counter()) == Counter(outcomes(config, 4000))
    assert wrapper.counts.calls == 4000


# ---- off


def test_off_is_the_models_own_method_and_no_call_is_counted() -> None:
    model = classifier()
    wrapper = ChaosModelWrapper(model, ChaosConfig(enabled=False))
    for name in ("predict", "predict_proba"):
        method = getattr(wrapper, name)
        assert method.__self__ is model and method.__func__ is getattr(type(model), name)
    assert (wrapper.predict(ROWS) == model.predict(ROWS)).all()
    assert wrapper.counts == ChaosCounts()


def test_the_switch_works_at_runtime_on_methods_kept_while_it_was_on() -> None:
    wrapper = ChaosModelWrapper(Steady(0), ChaosConfig(exceptions=1, timeouts=0, wrong=0))
    kept = wrapper.predict
    with pytest.raises(ChaosError):
        kept()
    wrapper.enabled = False
    assert kept() == wrapper.predict() == wrapper(0) == 0
    wrapper.enabled = True
    for call in (kept, wrapper.predict, lambda: wrapper(0)):
        with pytest.raises(ChaosError):
            call()


# ---- what goes through


def test_everything_else_is_the_models() -> None:
    model = classifier()
    wrapper = ChaosModelWrapper(model, ALWAYS_WRONG)
    assert wrapper.classes_ is model.classes_ and wrapper.get_params() == model.get_params()
    assert not hasattr(wrapper, "decision_function") and not callable(wrapper)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapper.nonsense
    assert ChaosModelWrapper(Steady(), ALWAYS_WRONG).version == "7"
    with pytest.raises(TypeError, match="no predict"):
        ChaosModelWrapper(object(), ALWAYS_WRONG)


def test_arguments_and_the_models_own_exceptions_come_through() -> None:
    quiet = ChaosConfig(failure_rate=0)
    assert ChaosModelWrapper(Steady(), quiet).predict(None, [1, 2], params={}) == [1, 2]
    assert ChaosModelWrapper(Steady(), quiet).predict(context=None, model_input="x") == "x"
    assert ChaosModelWrapper(Params(), quiet).predict([2.0], params={"factor": 3.0}).tolist() == [6.0]
    with pytest.raises(ValueError, match="features"):
        ChaosModelWrapper(classifier(), quiet).predict(np.zeros((1, 9)))


# ---- wrong, and yet an answer


def test_labels_become_other_labels_of_the_model() -> None:
    model = classifier()
    wrong = ChaosModelWrapper(model, ALWAYS_WRONG).predict(ROWS)
    right = model.predict(ROWS)
    assert wrong.dtype == right.dtype and wrong.shape == right.shape
    assert (wrong != right).all() and set(wrong) <= set(model.classes_)


def test_probabilities_stay_probabilities() -> None:
    model = classifier()
    wrong, right = ChaosModelWrapper(model, ALWAYS_WRONG).predict_proba(ROWS), model.predict_proba(ROWS)
    assert wrong.dtype == right.dtype and wrong.shape == right.shape
    assert np.allclose(wrong.sum(axis=1), 1) and (wrong >= 0).all()
    assert (np.abs(wrong - right).max(axis=1) > 1e-3).all()
    even = ChaosModelWrapper(Steady(np.full((2, 2), 0.5)), ALWAYS_WRONG).predict()
    assert np.allclose(even, [[0.75, 0.25]] * 2)


@pytest.mark.parametrize("model", [make_pipeline(StandardScaler(), LinearRegression()), LinearRegression()])
def test_regression_is_off_by_several_standard_deviations(model: Any) -> None:
    model.fit(ROWS, ROWS @ [1.0, 2.0, 3.0])
    wrong, right = ChaosModelWrapper(model, ALWAYS_WRONG).predict(ROWS), model.predict(ROWS)
    off = np.abs(wrong - right) / right.std()
    assert (off > 2.9).all() and (off < 6.1).all()


def test_single_numbers_are_judged_by_the_answers_before() -> None:
    wrapper = ChaosModelWrapper(Steady(), ChaosConfig(exceptions=0, timeouts=0, wrong=0.1, seed=2))
    values = (100 + RNG.normal(size=300)).tolist()
    answers = [wrapper.predict(None, v) for v in values]
    off = [abs(a - v) for a, v in zip(answers, values, strict=True) if a != v]
    assert len(off) == wrapper.counts.wrong > 10
    assert all(type(a) is float for a in answers)
    assert all(1.5 < x < 10 for x in off[1:]), off


@pytest.mark.parametrize(
    "answer",
    [
        pd.Series([1.0, 2.0, 4.0], index=[5, 6, 7], name="score"),
        pd.Series(["a", "b", "a"], dtype="category", name="class"),
        pd.Series([0, 1, 1], index=list("xyz")),
        pd.DataFrame({"p0": [0.2, 0.5], "p1": [0.8, 0.5]}, index=[3, 4]),
        pd.DataFrame({"label": ["a", "b"], "score": [0.5, 0.25]}),
        np.array([[0.1, 0.2, 0.7]], dtype=np.float32),
        np.array([True, False]),
        np.array([[1], [0]]),
        np.arange(500),
        [0.1, 0.9, 0.4],
        ["cat", "dog"],
        [[0.2, 0.8], [0.5, 0.5]],
        [{"label": "a"}, {"label": "b"}],
        (1, 0, 1),
        {"outputs": np.array([1.5, 2.5]), "labels": ["x", "y"]},
        3.5,
        1,
        True,
        np.float32(2.5),
        np.int64(0),
    ],
    ids=repr,
)
def test_wrong_answers_keep_type_shape_and_dtype(answer: Any) -> None:
    config = ChaosConfig(exceptions=0, timeouts=0, wrong=0.5, seed=4)
    kept = copy.deepcopy(answer)
    wrapper = ChaosModelWrapper(Steady(answer), config)
    wrong = [given for _ in range(20) if not _same(given := wrapper.predict(), kept)]
    assert wrapper.counts.wrong == len(wrong) > 0
    assert _same(answer, kept), "the model's own object was changed"
    for given in wrong:
        assert type(given) is type(answer)
        for got, right in _parts(given, answer):
            got, right = np.asarray(got), np.asarray(right)
            assert got.shape == right.shape and got.dtype.kind == right.dtype.kind
            differs = got != right
            assert (differs.any(axis=1) if got.ndim == 2 else differs).all()
        if hasattr(answer, "index") and not isinstance(answer, (list, tuple)):
            assert given.index.equals(answer.index)
        if hasattr(answer, "dtype"):
            assert given.dtype == answer.dtype
        if isinstance(answer, pd.DataFrame):
            assert given.dtypes.equals(answer.dtypes)


def _parts(given: Any, right: Any) -> list[tuple[Any, Any]]:
    if isinstance(right, dict):
        assert given.keys() == right.keys()
        return [(given[k], right[k]) for k in right]
    if isinstance(right, list) and isinstance(right[0], dict):
        assert [x.keys() for x in given] == [x.keys() for x in right]
        return [([x[k] for x in given], [x[k] for x in right]) for k in right[0]]
    return [(given, right)]


def _same(a: Any, b: Any) -> bool:
    return pickle.dumps(a) == pickle.dumps(b) if isinstance(a, dict) else bool(np.all(np.asarray(a == b)))


def test_several_outputs_are_wrong_each_in_its_own_labels() -> None:
    targets = np.stack([np.where(ROWS[:, 0] > 0, 1, 2), np.where(ROWS[:, 1] > 0, 30, 40)], axis=1)
    model = MultiOutputClassifier(GaussianNB()).fit(ROWS, targets)
    wrapper = ChaosModelWrapper(model, ALWAYS_WRONG)
    wrong = wrapper.predict(ROWS)
    assert (wrong != model.predict(ROWS)).all()
    assert set(wrong[:, 0]) <= {1, 2} and set(wrong[:, 1]) <= {30, 40}
    both = wrapper.predict_proba(ROWS)
    assert isinstance(both, list) and all(np.allclose(p.sum(axis=1), 1) for p in both)


@pytest.mark.parametrize("answer", ["only", np.array([], dtype=float), object(), None])
def test_where_no_other_answer_is_known_the_right_one_is_given_and_counted_as_such(answer: Any) -> None:
    wrapper = ChaosModelWrapper(Steady(), ALWAYS_WRONG)
    assert wrapper.predict(None, answer) is answer
    assert wrapper.counts == ChaosCounts(calls=1, unchanged=1)


# ---- configuration


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"exceptions": 1.5}, r"exceptions: 1\.5\. Allowed: a number from 0 to 1"),
        ({"wrong": -0.1}, r"wrong: -0\.1\. Allowed"),
        ({"timeouts": float("nan")}, r"timeouts: nan\. Allowed"),
        ({"failure_rate": "8%"}, r"failure_rate: '8%'\. Allowed"),
        ({"timeout_s": float("inf")}, r"timeout_s: inf\. Allowed: a number from 0 to 3600"),
        ({"seed": -1}, r"seed: -1\. Allowed: an integer"),
        ({"enabled": "yes"}, r"enabled: 'yes' is not a truth value"),
        ({"exceptions": 0.6, "timeouts": 0.6}, r"1\.21 is more than every call"),
        ({"failure_rate": 0.1, "exceptions": 0, "timeouts": 0, "wrong": 0}, "of nothing"),
    ],
)
def test_bad_configuration_is_told_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as told:
        ChaosConfig(**given)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("environ", "enabled", "rate"),
    [
        ({}, False, None),
        ({"CHAOS_ENABLED": ""}, False, None),
        ({"CHAOS_ENABLED": "True"}, True, None),
        ({"CHAOS_ENABLED": "off", "CHAOS_FAILURE_RATE": "0.2"}, False, 0.2),
        ({"CHAOS_ENABLED": "1", "CHAOS_FAILURE_RATE": "16%"}, True, 0.16),
    ],
)
def test_the_environment_switches_and_scales(environ: dict[str, str], enabled: bool, rate: float | None) -> None:
    config = ChaosConfig.from_env(environ, ChaosConfig(seed=8))
    assert (config.enabled, config.failure_rate, config.seed) == (enabled, rate, 8)
    total = 0.08 if rate is None else rate
    assert config.rates == pytest.approx((total * 5 / 8, total * 2 / 8, total * 1 / 8))


@pytest.mark.parametrize(
    "environ", [{"CHAOS_ENABLED": "maybe"}, {"CHAOS_FAILURE_RATE": "lots"}, {"CHAOS_FAILURE_RATE": "108%"}]
)
def test_a_variable_that_cannot_be_read_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(environ))}: '.*'\. Allowed: [^\n]+$"):
        ChaosConfig.from_env(environ)


# ---- shipped


@pytest.mark.parametrize("keep", ["pickle", "joblib", "deepcopy"])
def test_a_saved_chaotic_model_is_the_same_chaotic_model(keep: str) -> None:
    wrapper = ChaosModelWrapper(classifier(), ChaosConfig(timeout_s=0, failure_rate=0.5, seed=13))
    first = [outcome(lambda: wrapper.predict(ROWS[:1])[0], "deny") for _ in range(50)]
    if keep == "deepcopy":
        loaded = copy.deepcopy(wrapper)
    elif keep == "pickle":
        loaded = pickle.loads(pickle.dumps(wrapper))
    else:
        buffer = io.BytesIO()
        joblib.dump(wrapper, buffer)
        loaded = joblib.load(io.BytesIO(buffer.getvalue()))
    assert type(loaded) is type(wrapper) and loaded.config == wrapper.config and loaded.model is not wrapper.model
    assert [outcome(lambda: loaded.predict(ROWS[:1])[0], "deny") for _ in range(50)] == first
    wrapper.enabled = False
    assert not pickle.loads(pickle.dumps(wrapper)).enabled
    assert callable(pickle.loads(pickle.dumps(ChaosModelWrapper(Steady(), ALWAYS_WRONG))))


def test_it_needs_nothing_else_of_the_package() -> None:
    code = (
        "import sys; from mlchaos_dagster import ChaosConfig, ChaosModelWrapper\n"
        "class Model:\n    def predict(self, x): return x\n"
        "ChaosModelWrapper(Model(), ChaosConfig(failure_rate=0)).predict(1)\n"
        "print(sorted(m for m in sys.modules if m.startswith('mlchaos_dagster') or m in ('numpy', 'pandas', 'dagster')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "['mlchaos_dagster', 'mlchaos_dagster.chaos_model']"
