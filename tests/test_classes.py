"""A label never means the name of one class and the number of another."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from far.classes import (
    check_same_classes,
    class_number,
    imagenet_classes,
    label_text,
    unmatched_classes,
)
from far.errors import InputError

PLAIN = ["0", "1", "2"]
FROM_ONE = ["1", "2", "3"]
SORTED_AS_TEXT = [str(name) for name in sorted(map(str, range(12)))]
PADDED = ["01", "02", "03"]


@pytest.mark.parametrize(
    ("classes", "label", "expected"),
    [
        (["cat", "dog"], "dog", 1),
        (["cat", "dog"], "1", 1),
        (["cat", "dog"], "number=1", 1),
        (["cat", "dog"], np.int64(1), 1),
        (["cat", "dog"], torch.tensor(1), 1),
        (PLAIN, "2", 2),
        (FROM_ONE, "3", 2),  # no class of this number
        (FROM_ONE, 1, 1),
        (FROM_ONE, "number=1", 1),
        (SORTED_AS_TEXT, "1", 1),
        (PADDED, "02", 1),
        (["7", "cat"], "7", 0),
        (["crane", "maillot", "crane"], "number=2", 2),
        (["crane", "maillot", "crane"], "2", 2),
    ],
)
def test_label_means_its_class(classes: list[str], label: Any, expected: int) -> None:
    assert class_number(classes, label) == expected


@pytest.mark.parametrize(
    ("classes", "label"),
    [
        (FROM_ONE, "1"),  # names class 0 and numbers class 1
        (FROM_ONE, "0"),  # numbers a class that another number names
        (SORTED_AS_TEXT, "2"),
        (PADDED, "1"),
        (["7", "cat"], "0"),
        (["crane", "maillot", "crane"], "crane"),  # two classes, as ImageNet has them
        (["0", "1", "0"], "0"),
        (["cat", "dog"], "bird"),
        (["cat", "dog"], "2"),
        (["cat", "dog"], -1),
        (["cat", "dog"], 1.0),
        (["cat", "dog"], np.float32(1)),
        (["cat", "dog"], True),
        (["cat", "dog"], np.bool_(True)),
        (["cat", "dog"], torch.tensor(True)),
        (["cat", "dog"], None),
        (["cat", "dog"], ["cat"]),
        (["cat", "dog"], "9" * 5000),
        (["cat", "dog"], "cat\ndog"),
    ],
)
def test_label_that_could_mean_another_class_or_none_is_refused(classes: list[str], label: Any) -> None:
    with pytest.raises(InputError) as error:
        class_number(classes, label)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    assert str(label)[:20].splitlines()[0] in message


def test_text_of_a_label_means_its_class_again() -> None:
    lists = [PLAIN, FROM_ONE, SORTED_AS_TEXT, PADDED, ["cat", "dog"]]
    lists += [list(names) for names in itertools.permutations(["0", "1", "2", "x"])]
    for classes in lists:
        assert [class_number(classes, label_text(classes, number)) for number in range(len(classes))] == list(
            range(len(classes))
        )
    assert label_text(["cat", "dog"], 1) == "1"


def test_different_class_names_are_reported_with_both_sides() -> None:
    check_same_classes(["a", "b"], "one", ("a", "b"), "other", "Nothing to do")
    with pytest.raises(InputError) as error:
        check_same_classes(
            ["a", "b", "c"], "set/train", ["a", "c", "z"], "run/latents", "Run far cache again"
        )
    for part in ("'b'", "'c'", "set/train", "run/latents", "far cache"):
        assert part in str(error.value)
    with pytest.raises(InputError) as error:
        check_same_classes(["a"], "set/train", ["a", "b"], "run/latents", "Run far cache again")
    for part in ("1", "2", "set/train", "run/latents"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "unmatched"),
    [
        (["cat", "dog"], ["dog", "cat"], []),
        (["cat", "dog"], ["cat", "owl"], ["dog", "owl"]),
        (["cat", "dog"], ["cat"], ["dog"]),
        (["cat", "dog"], [], []),
        (PLAIN, ["cat", "dog"], []),
        (FROM_ONE, PLAIN, []),
    ],
)
def test_unmatched_classes_are_those_that_one_side_names(
    ours: list[str], theirs: list[str], unmatched: list[str]
) -> None:
    assert unmatched_classes(ours, theirs) == unmatched_classes(theirs, ours) == unmatched


def test_numbers_of_imagenet_have_their_published_names() -> None:
    """The samples of DiT and MAR show these classes."""
    words = list(imagenet_classes().values())
    shown = {207: "golden retriever", 360: "otter", 387: "lesser panda", 974: "geyser", 88: "macaw",
             979: "valley", 417: "balloon", 279: "Arctic fox"}  # fmt: skip
    assert {number: words[number] for number in shown} == shown
    assert all(class_number(words, word) == class_number(words, str(n)) == n for n, word in shown.items())
    assert len(words) == 1000
    assert sorted(imagenet_classes()) == list(imagenet_classes())
    assert {word for word in words if words.count(word) > 1} == {"crane", "maillot"}


@pytest.mark.parametrize(
    ("label", "near"),
    [
        ("makaw", "macaw"),
        ("Macaw", "macaw"),
        ("golden_retriever", "golden retriever"),
        ("retriever", "golden retriever"),
    ],
)
def test_unknown_word_names_the_nearest_of_many_classes(label: str, near: str) -> None:
    with refused(repr(label), near):
        class_number(list(imagenet_classes().values()), label)


def test_wordnet_ids_and_words_are_the_same_classes_of_imagenet() -> None:
    ids, words = list(imagenet_classes()), list(imagenet_classes().values())
    check_same_classes(ids, "set", words, "model", "Nothing to do")
    assert unmatched_classes(ids[:10], words[:10]) == []
    with refused("class 1 ", "'goldfish'", "'n01440764'"):
        check_same_classes(["n01440764", "goldfish"], "set", ["tench", "n01440764"], "model", "X")
