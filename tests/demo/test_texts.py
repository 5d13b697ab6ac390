# Licensed under the Apache License, Version 2.0
"""The texts of the demonstration: those of the running Python, each in one split."""

from optimum_heapr.demo import demo_texts


def test_a_caller_may_change_what_it_is_given():
    texts = demo_texts("evaluation")
    expected = list(texts)
    texts.clear()
    assert demo_texts("evaluation") == expected and len(expected) > 10


def test_no_text_is_in_two_splits():
    assert not set(demo_texts("calibration")) & set(demo_texts("evaluation"))
