"""What a run is at one instant, named device arrays and JSON-able host values, and how a trainer is put back there."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.closing import Closing
from o2o.replay.host import HostReplay
from o2o.train import programs as dispatch
from o2o.train.pretraining import phase_at
from o2o.train.programs import OnlineState, over_seeds
from o2o.train.schedule import Counters

if TYPE_CHECKING:
    from o2o.train.trainer import Trainer


def arrays(trainer: "Trainer") -> dict[str, Any]:
    """Return every device array of the run, by name (o2o.train.checkpoint)."""
    stats = {} if trainer.normalizer is None else {"normalizer": trainer.normalizer}
    if trainer.online_state is None:
        return {"agent": trainer.agent, "loop": {"rng": trainer.rng, "totals": trainer.offline_totals}, **stats}
    agent, buffer, carry, rng, totals = trainer.online_state
    loop = {"rng": rng, "totals": totals, "observations": _observations(trainer)}
    if trainer.action is not None:
        loop["action"] = trainer.action
    if carry is not None:
        loop["carry"] = carry
    return {"agent": agent, "buffer": buffer, "loop": loop, **stats}


def _observations(trainer: "Trainer") -> Any:
    """Return what the policy sees next, or zeros of that shape, where the environments are still to be made."""
    if trainer.fleet is not None:
        return trainer.fleet.observations
    if trainer.stood is not None:
        return trainer.stood[1]
    members = int(np.prod(trainer.slots_shape))
    rows = trainer.offline_data.rows["observations"]
    return jax.tree.map(lambda leaf: np.zeros((members, *leaf.shape[1:]), leaf.dtype), rows)


def state(trainer: "Trainer") -> dict[str, Any]:
    """Return every host value of the run, JSON-able.

    Evaluations of earlier steps are waited for, they are part of it. One of this step may be under way or have failed
    (`unscored`): who goes on from here plays it again.
    """
    unscored = trainer.take_earlier_evaluations()
    return {
        "unscored": unscored,
        "counters": dict(vars(trainer.counters)),
        "fleet": trainer.fleet.snapshot() if trainer.fleet is not None else trainer.stood and trainer.stood[0],
        "visible": trainer.visible,
        "updates_since_log": trainer.updates_since_log,
        "host": isinstance(trainer.programs, HostReplay),
        "planned": trainer.planned,
    }


def restore(
    trainer: "Trainer", state: dict[str, Any], load: Callable[[dict[str, Any]], dict[str, Any]], online_steps: int
) -> None:
    """Put the run where `state` says, all but the environments; `load(targets)` reads arrays of a given structure."""
    if state["counters"]["phase"] == "online":
        trainer.begin_online(state.get("planned") or online_steps, state.get("host"), play=False)
    targets = arrays(trainer)
    data = trainer.offline_data
    if trainer.online_state is not None:
        targets["loop"]["action"] = jnp.zeros((*trainer.slots_shape, *data.rows["actions"].shape[1:]))
    elif state["counters"]["offline_steps"] != state["counters"]["logged_at"]:
        steps = state["counters"].get("offline_total", 0)
        phase = phase_at(trainer.agent, steps, state["counters"]["offline_steps"])
        zeros = over_seeds(lambda agent: dispatch.metric_zeros(agent, data, phase), trainer.seeds)
        targets["loop"]["totals"] = zeros(trainer.agent)
    loaded = load(targets)
    trainer.counters = Counters(**state["counters"])
    trainer.visible, trainer.updates_since_log = list(state["visible"]), state["updates_since_log"]
    trainer.unscored = trainer.counters.point if state.get("unscored") else None
    trainer.normalizer = loaded.get("normalizer", trainer.normalizer)
    part = loaded["loop"]
    if trainer.online_state is None:
        trainer.agent, trainer.rng, trainer.offline_totals = loaded["agent"], part["rng"], part["totals"]
        return
    trainer.online_state = OnlineState(
        loaded["agent"], trainer.placed(loaded["buffer"]), part.get("carry"), part["rng"], part["totals"]
    )
    trainer.action, trainer.stood = part["action"], (state["fleet"], part["observations"])


def put_back(trainer: "Trainer") -> None:
    """Put the environments where they are to stand, if they do not: those of a restored run, a robot after evaluation.

    Where one stands elsewhere, its half episode ends and its policy begins afresh.
    """
    if trainer.stood is not None:
        trainer.exact_resume = _restore_fleet(trainer, *trainer.stood)
    elif trainer.moved and trainer.fleet is not None:
        trainer.fleet.begin_anew()
        _begin_anew(trainer, np.zeros(len(trainer.fleet.slots), bool))
    trainer.moved = False


def _restore_fleet(trainer: "Trainer", snapshot: dict[str, Any], observations: Any) -> bool:
    """Put the environments back, all or none; whether all of them stand where they stood."""
    assert trainer.online_state is not None
    if trainer.fleet is None:
        online = trainer.online_config
        waits = online.replay != "rollout" and "mc_returns" in trainer.online_state.agent.needs.keys
        trainer.make_fleet(waits, online.num_envs if online.replay == "rollout" else 1)
    fleet, trainer.fleet = trainer.fleet, None
    assert fleet is not None
    with Closing() as closing:
        closing.callback(fleet.close)
        same = np.asarray(fleet.restore(snapshot, observations))
        closing.pop_all()
    trainer.fleet, trainer.stood = fleet, None
    _begin_anew(trainer, same)
    return bool(same.all())


def may_move(trainer: "Trainer") -> bool:
    """Whether evaluation moves what training stands on; raises what keeps that from being moved at all."""
    fleet = trainer.fleet
    if fleet is None or fleet.replayable:
        return False
    if fleet.fault is not None:
        raise fleet.fault
    return True


def _begin_anew(trainer: "Trainer", same: np.ndarray) -> None:
    """Where environments, fresh from a reset, are not the `same` as before: end their half episodes.

    As if cut by a time limit: the newest row ends its episode, and nothing is remembered of it.
    """
    if same.all():
        return
    assert trainer.online_state is not None and trainer.fleet is not None
    trainer.mark_ends(~same)
    same = same.reshape(trainer.slots_shape)
    stood, action = trainer.online_state, trainer.action
    fresh = jax.vmap(lambda a: a.initial_carry(trainer.slots_shape[1:] or (1,)))(stood.agent)
    trainer.online_state = stood._replace(carry=dispatch.clear_carry(stood.carry, fresh, ~same))
    if trainer.fleet.waits:
        trainer.commit(np.flatnonzero(~same.reshape(-1)))
    else:
        trainer.fleet.forget(np.flatnonzero(~same.reshape(-1)))
    trainer.first_actions()
    assert trainer.online_state is not None and trainer.action is not None and action is not None
    carry = dispatch.clear_carry(trainer.online_state.carry, stood.carry, same)
    trainer.online_state = trainer.online_state._replace(carry=carry)
    trainer.action = jnp.where(same[..., None], action, trainer.action)
