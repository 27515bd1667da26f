"""Scenes that only their captions tell apart: true captions, all different, none that is held out."""

import torch

from demo.captions import describe, expect
from demo.relatives import GROUP, make_relatives
from demo.scene import held_out_combinations
from demo.train_clip import make_close_batch, tokenize

GROUPS = [make_relatives(5, index, (64, 88)) for index in range(60)]


def test_a_group_shares_its_ground_and_no_two_captions_are_equal() -> None:
    for group in GROUPS:
        assert len(group) == GROUP
        assert len({scene.ground for scene, _ in group}) == 1
        assert {scene.size_hw for scene, _ in group} == {(64, 88)}
        assert len({caption for _, caption in group}) == GROUP


def test_captions_are_true_and_nothing_held_out_is_shown() -> None:
    for scene, caption in (pair for group in GROUPS for pair in group):
        assert caption in describe(scene)
        assert not {(shape.kind, shape.colour) for shape in scene.shapes} & set(held_out_combinations())


def test_relatives_differ_in_kind_in_place_and_in_which_shape_is_which() -> None:
    kinds = places = swaps = 0
    for group in GROUPS:
        base, *others = (scene for scene, _ in group)
        for other in others:
            assert len(other.shapes) == len(base.shapes)
            kinds += {s.kind for s in other.shapes} != {s.kind for s in base.shapes}
            places += [s.centre_yx for s in other.shapes] != [s.centre_yx for s in base.shapes]
            pairs = [sorted((s.kind, s.colour) for s in scene.shapes) for scene in (base, other)]
            parts = [
                sorted(part for shape in scene.shapes for part in (shape.kind, shape.colour)) for scene in (base, other)
            ]
            swaps += pairs[0] != pairs[1] and parts[0] == parts[1]
    count = len(GROUPS) * (GROUP - 1)
    assert kinds > 0.4 * count
    assert 0.25 * count < places < 0.7 * count
    assert swaps > 0.005 * count


def test_a_batch_is_made_of_whole_groups_and_is_the_same_again() -> None:
    pixels, ids = make_close_batch(5, 1, 2 * GROUP)
    assert pixels.shape == (2 * GROUP, 3, 48, 48)
    again = make_close_batch(5, 1, 2 * GROUP)
    assert torch.equal(pixels, again[0])
    assert torch.equal(ids, again[1])
    group = make_relatives(5, 2, (64, 88))  # step 1 has groups 2 and 3, in the second size
    expected = tokenize([caption for _, caption in group])
    assert torch.equal(ids[:GROUP, : expected.shape[1]], expected)
    assert all(expect(caption) for _, caption in group)


def test_twins_show_the_same_names_and_stand_elsewhere_or_are_exchanged() -> None:
    for group in (make_relatives(5, index, (64, 88), twins=1.0) for index in range(60)):
        assert len({caption for _, caption in group}) == len(group)
        first = group[0][0]
        for scene, _ in group[1:]:
            assert scene.ground == first.ground
            assert sorted(shape.kind for shape in scene.shapes) == sorted(shape.kind for shape in first.shapes)
            assert sorted(shape.colour for shape in scene.shapes) == sorted(shape.colour for shape in first.shapes)
            are_moved = [shape.centre_yx for shape in scene.shapes] != [shape.centre_yx for shape in first.shapes]
            are_exchanged = [(s.kind, s.colour) for s in scene.shapes] != [(s.kind, s.colour) for s in first.shapes]
            assert are_moved != are_exchanged or scene == first  # in another caption
