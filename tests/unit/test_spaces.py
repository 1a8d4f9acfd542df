"""Flattening of observations and the map of actions."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings, strategies as st

from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.errors import EnvironmentMismatchError


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.float64)


GOAL = spaces.Dict({"observation": box(4), "desired_goal": box(2), "achieved_goal": box(2)})
CAMERA = spaces.Dict({"wrist": spaces.Box(0, 255, (8, 6, 3), np.uint8), "pose": box(3), "grip": box()})


def test_dict_order_is_alphabetical():
    """The order of a dict's entries is alphabetical, whatever the order of its keys."""
    spec = ObservationSpec.from_space(GOAL)
    observation = {
        "observation": np.arange(4.0),
        "achieved_goal": np.array([8.0, 8]),
        "desired_goal": np.array([9.0, 7]),
    }
    assert spec.flatten(observation).tolist() == [9, 7, 0, 1, 2, 3]
    assert spec.flatten(dict(reversed(observation.items()))).tolist() == [9, 7, 0, 1, 2, 3]
    assert spec.flatten(observation).dtype == np.float32
    assert str(spec) == "desired_goal[2] + observation[4]"


def test_achieved_goal_on_request():
    """The achieved goal is included only on request."""
    spec = ObservationSpec.from_space(GOAL, achieved_goal=True)
    assert spec.shape == (8,)
    assert [leaf.name for leaf in spec.leaves] == ["achieved_goal", "desired_goal", "observation"]


def test_batch_flattens_like_rows():
    """A batch is flattened like its rows."""
    rng = np.random.default_rng(0)
    spec = ObservationSpec.from_space(GOAL)
    batch = {key: rng.normal(size=(5, *space.shape)) for key, space in GOAL.spaces.items()}
    rows = [spec.flatten({key: value[i] for key, value in batch.items()}) for i in range(5)]
    np.testing.assert_array_equal(spec.flatten(batch), np.stack(rows))


def test_images_stay_uint8():
    """Images stay uint8 beside the state."""
    spec = ObservationSpec.from_space(CAMERA)
    image = np.full((8, 6, 3), 200, np.uint8)
    flat = spec.flatten({"wrist": image, "pose": np.arange(3.0), "grip": np.float64(9)})
    assert flat["wrist"].dtype == np.uint8 and np.array_equal(flat["wrist"], image)
    assert flat["state"].tolist() == [9, 0, 1, 2]
    assert spec.shape == {"state": (4,), "wrist": (8, 6, 3)}
    assert spec.space["wrist"].dtype == np.uint8


def test_images_of_other_type_refused():
    """Images of another type are refused."""
    seen = {"wrist": np.full((8, 6, 3), 0.5), "pose": np.arange(3.0), "grip": np.float64(9)}
    with pytest.raises(EnvironmentMismatchError, match="entry 'wrist': images are float64, expected uint8"):
        ObservationSpec.from_space(CAMERA).flatten(seen)


def test_bare_image_space():
    """A space of one image alone is taken."""
    spec = ObservationSpec.from_space(spaces.Box(0, 255, (8, 6, 3), np.uint8))
    assert spec.shape == {"image": (8, 6, 3)}
    assert set(spec.flatten(np.zeros((2, 8, 6, 3), np.uint8))) == {"image"}


def test_nested_and_tuple_spaces():
    """Nested and tuple spaces are flattened."""
    space = spaces.Dict({"b": spaces.Tuple((box(2), box(1))), "a": spaces.Dict({"y": box(1), "x": box(1)})})
    flat = ObservationSpec.from_space(space).flatten(
        {"b": (np.array([3.0, 4]), np.array([5.0])), "a": {"x": np.array([1.0]), "y": np.array([2.0])}}
    )
    assert flat.tolist() == [1, 2, 3, 4, 5]


def test_unflattenable_entry_named():
    """The error for observations that cannot be flattened names the entry."""
    with pytest.raises(EnvironmentMismatchError, match="mode is Discrete"):
        ObservationSpec.from_space(spaces.Dict({"mode": spaces.Discrete(3), "x": box(1)}))
    with pytest.raises(EnvironmentMismatchError, match="no entry 'observation'"):
        ObservationSpec.from_space(GOAL).flatten({"desired_goal": np.zeros(2)})
    with pytest.raises(EnvironmentMismatchError, match="'desired_goal' has shape"):
        ObservationSpec.from_space(GOAL).flatten({"desired_goal": np.zeros(3), "observation": np.zeros(4)})


def test_unit_bounds_map_exactly():
    """Actions within unit bounds are mapped exactly."""
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 3)).astype(np.float32)
    action_map = ActionMap.from_space(spaces.Box(-1, 1, (3,), np.float32))
    assert np.array_equal(action_map.to_env(actions), actions)
    assert np.array_equal(action_map.from_env(actions), actions)


@settings(max_examples=50, deadline=None)
@given(st.floats(-100, 99), st.floats(0.01, 50), st.lists(st.floats(-1, 1), min_size=2, max_size=2))
def test_map_round_trips(low, width, action):
    """The map takes actions there and back, and stays inside the bounds."""
    space = spaces.Box(np.full(2, low, np.float32), np.full(2, low + width, np.float32))
    action_map = ActionMap.from_space(space)
    mapped = action_map.to_env(action)
    assert np.all(mapped >= space.low) and np.all(mapped <= space.high)
    np.testing.assert_allclose(action_map.from_env(mapped), action, atol=1e-5 + 1e-5 * abs(low) / width)


def test_map_clips_and_keeps_shapes():
    """The map clips actions and keeps their shapes."""
    action_map = ActionMap.from_space(spaces.Box(-0.4, 0.4, (2, 2), np.float32))
    assert action_map.dim == 4
    np.testing.assert_allclose(action_map.to_env([2.0, -2.0, 0.5, 0.0]), [[0.4, -0.4], [0.2, 0.0]], atol=1e-7)
    assert action_map.from_env(np.zeros((7, 2, 2))).shape == (7, 4)


def test_outside_marks_coordinate():
    """`outside` marks the coordinate that is outside the bounds."""
    action_map = ActionMap.from_space(spaces.Box(-1, 1, (2,), np.float32))
    assert action_map.outside([[1.0, -1.0], [1.0000001, 1.01]]).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("space", [spaces.Discrete(4), spaces.MultiBinary(3), spaces.Box(0, 5, (2,), np.int64)])
def test_discrete_actions_refused(space):
    """Discrete actions are refused."""
    with pytest.raises(EnvironmentMismatchError, match="continuous Box"):
        ActionMap.from_space(space)


def test_unbounded_actions_refused():
    """Unbounded actions are refused."""
    with pytest.raises(EnvironmentMismatchError, match=r"no finite bounds: .*gymnasium\.wrappers\.TransformAction"):
        ActionMap.from_space(box(2))


@pytest.mark.parametrize("bound", [0.1, 0.3, 1.1, 1.0])
def test_actions_within_float64_bounds(bound):
    """Actions stay within bounds of float64."""
    space = spaces.Box(-bound, bound, (2,), np.float64)
    played = ActionMap.from_space(space).to_env([1.0, -1.0])
    assert space.contains(played) and played.dtype == np.float32
    np.testing.assert_allclose(played, [bound, -bound], rtol=0.0 if bound == 1.0 else 2e-7)


def test_unflatten_restores_structure():
    """`unflatten` gives the environment's own structure back."""
    space = spaces.Dict({"goals": spaces.Tuple((box(2), box(1, 2))), "achieved_goal": box(2), "pose": box(3), **CAMERA})
    spec = ObservationSpec.from_space(space)
    rng = np.random.default_rng(0)
    own = {
        "goals": (rng.normal(size=2), rng.normal(size=(1, 2))),
        "achieved_goal": np.zeros(2),
        "pose": rng.normal(size=3),
        "grip": rng.normal(size=()),
        "wrist": rng.integers(0, 255, (8, 6, 3), np.uint8),
    }
    back = spec.unflatten(spec.flatten(own))
    assert set(back) == {"goals", "pose", "grip", "wrist"} and isinstance(back["goals"], tuple)
    parts = [(*tree["goals"], tree["pose"], tree["grip"]) for tree in (back, own)]
    for ours, theirs in zip(*parts, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert ours.shape == theirs.shape and ours.dtype == np.float32
    np.testing.assert_array_equal(back["wrist"], own["wrist"])
    flat = ObservationSpec.from_space(box(2, 2))
    np.testing.assert_array_equal(flat.unflatten(flat.flatten(np.eye(2))), np.eye(2))


def test_latest_of_joined_observations():
    """`latest` gives the newest of joined observations."""
    spec = ObservationSpec.from_space(CAMERA)
    state, image = np.arange(8.0), np.arange(8 * 6 * 6).reshape(8, 6, 6)
    latest = spec.latest({"state": state, "wrist": image, "base_action": np.zeros(4)})
    np.testing.assert_array_equal(latest["state"], state[4:])
    np.testing.assert_array_equal(latest["wrist"], image[..., 3:])
    assert set(latest) == {"state", "wrist"}
    np.testing.assert_array_equal(ObservationSpec.from_space(box(3)).latest(np.arange(6)), [3, 4, 5])


def test_fitted_map_leaves_residual_room():
    """A map fitted to actions leaves room for a full residual."""
    bounds = ActionMap.from_space(spaces.Box(-10.0, 10.0, (3,), np.float32))
    actions = np.asarray([[-2.0, 5.0, 1.0], [4.0, 5.0, 1.02], [0.0, 5.0, 1.0]])
    fitted = bounds.fitted(actions, 0.2)
    np.testing.assert_allclose(fitted.low, [1 - 1.2 * 3, 5 - 1.2 * 0.05, 1.01 - 1.2 * 0.05], atol=1e-6)
    np.testing.assert_allclose(fitted.high, [1 + 1.2 * 3, 5 + 1.2 * 0.05, 1.01 + 1.2 * 0.05], atol=1e-6)
    np.testing.assert_allclose(fitted.to_env(fitted.from_env(actions)), actions, atol=1e-6)
    extreme = fitted.from_env(actions)[:, 0]
    np.testing.assert_allclose(extreme[:2] * 1.2, [-1.0, 1.0], atol=1e-6)
    assert np.abs(extreme[:2]).max() + 0.2 / 1.2 == pytest.approx(1.0)


def test_fitted_map_within_bounds():
    """A fitted map stays within the bounds."""
    bounds = ActionMap.from_space(spaces.Box(-1.0, 1.0, (2,), np.float32))
    fitted = bounds.fitted(np.asarray([[-1.0, 1.0], [0.5, 1.0]]), 0.5)
    np.testing.assert_allclose(fitted.low, [-1.0, 1 - 1.5 * 0.05], atol=1e-6)
    np.testing.assert_allclose(fitted.high, [-0.25 + 1.5 * 0.75, 1.0], atol=1e-6)
    assert np.abs(fitted.to_env(np.asarray([[-1.0, 1.0], [1.0, -1.0]]))).max() <= 1.0
