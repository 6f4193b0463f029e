"""Configurations compared: every difference is named."""

import json

from lab.folders import differences


def test_equal_configurations_do_not_differ():
    config = {"run": {"ema": True, "alphas": [0.0, 1.0]}, "name": "run_1"}
    assert differences(config, json.loads(json.dumps(config))) == []


def test_every_difference_is_named_with_both_values_and_where_it_stands():
    old = {"run": {"ema": True, "alpha": 0.1}, "name": "run_1", "layers": [3]}
    new = {"run": {"ema": False, "alpha": 0.1}, "name": "run_1", "layers": [3, 4], "more": 7}
    assert differences(old, new) == [
        "layers is [3] there and [3, 4] now",
        "more is 'absent' there and 7 now",
        "run.ema is True there and False now",
    ]
    assert differences({"run": None}, {"run": {"ema": True}}) == [
        "run is None there and {'ema': True} now"
    ]
