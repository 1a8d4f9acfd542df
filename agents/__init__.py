"""The agents: `AGENTS` maps the command line's name to the class; configs are exported next to their agents."""

from collections.abc import Callable
from typing import TypeVar

from o2o.agents.awac import AWAC, AWACConfig
from o2o.agents.bc import BC, BCConfig
from o2o.agents.cql import CQL, CalQL, CalQLConfig, Conservative, CQLConfig
from o2o.agents.expo import EXPO, EXPOConfig
from o2o.agents.famo2o import FamO2O, FamO2OConfig
from o2o.agents.famo2o_cql import FamO2OCQL, FamO2OCQLConfig
from o2o.agents.fql import FQL, FQLConfig
from o2o.agents.generative_bc import DiffusionBC, DiffusionBCConfig, FlowBC, FlowBCConfig
from o2o.agents.ibrl import IBRL, IBRLConfig
from o2o.agents.iql import IQL, IQLConfig
from o2o.agents.jsrl import JSRL, JSRLConfig
from o2o.agents.pex import PEX, PEXConfig
from o2o.agents.ppo import PPO, PPOConfig
from o2o.agents.qc import QC, QCConfig
from o2o.agents.rebrac import ReBRAC, ReBRACConfig
from o2o.agents.residual import Residual, ResidualConfig
from o2o.agents.sac import RLPD, SAC, RLPDConfig, SACConfig
from o2o.agents.td3bc import TD3BC, TD3BCConfig
from o2o.agents.uni_o4 import UniO4, UniO4Config
from o2o.agents.wsrl import WSRL, WSRLConfig
from o2o.errors import ConfigError
from o2o.types import Agent

AGENTS: dict[str, type] = {"bc": BC, "iql": IQL, "cql": CQL, "calql": CalQL, "sac": SAC, "rlpd": RLPD, "wsrl": WSRL}
AGENTS |= {"diffusion_bc": DiffusionBC, "flow_bc": FlowBC}
AGENTS |= {"qc": QC}
AGENTS |= {"expo": EXPO}
AGENTS |= {"residual": Residual}
AGENTS |= {"famo2o": FamO2O, "famo2o_cql": FamO2OCQL}
AGENTS |= {"ppo": PPO, "uni_o4": UniO4}
AGENTS |= {"awac": AWAC, "td3bc": TD3BC, "pex": PEX}
AGENTS |= {"ibrl": IBRL, "jsrl": JSRL}
AGENTS |= {"rebrac": ReBRAC, "fql": FQL}

Kind = TypeVar("Kind", bound=type[Agent])


def register_agent(name: str) -> Callable[[Kind], Kind]:
    """Return a decorator that makes an agent class of one's own known by `name`, as the toolkit's own are.

    A run of it keeps `module:Class` in its config.json, so that any process can open it again. Raises `ConfigError` if
    the name is taken by another class.
    """

    def register(kind: Kind) -> Kind:
        known = AGENTS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ConfigError(
                f"agent name {name!r} is taken by {known.__module__}:{known.__qualname__}; choose another"
            )
        if not name.isidentifier():
            raise ConfigError(f"agent name {name!r} is no identifier, such as my_agent")
        AGENTS[name] = kind
        return kind

    return register


__all__ = [
    "AGENTS",
    "AWAC",
    "BC",
    "CQL",
    "EXPO",
    "FQL",
    "IBRL",
    "IQL",
    "JSRL",
    "PEX",
    "PPO",
    "QC",
    "RLPD",
    "SAC",
    "TD3BC",
    "WSRL",
    "ReBRAC",
    "Residual",
    "UniO4",
    "AWACConfig",
    "BCConfig",
    "CQLConfig",
    "CalQL",
    "CalQLConfig",
    "Conservative",
    "DiffusionBC",
    "DiffusionBCConfig",
    "EXPOConfig",
    "FamO2O",
    "FamO2OCQL",
    "FamO2OCQLConfig",
    "FamO2OConfig",
    "FlowBC",
    "FQLConfig",
    "FlowBCConfig",
    "IBRLConfig",
    "IQLConfig",
    "JSRLConfig",
    "PEXConfig",
    "PPOConfig",
    "QCConfig",
    "RLPDConfig",
    "ReBRACConfig",
    "ResidualConfig",
    "SACConfig",
    "UniO4Config",
    "TD3BCConfig",
    "WSRLConfig",
    "register_agent",
]
