"""The agents: `AGENTS` maps the command line's name to the class; configs are exported next to their agents."""

from o2o.agents.bc import BC, BCConfig
from o2o.agents.cql import CQL, CalQL, CalQLConfig, Conservative, CQLConfig
from o2o.agents.iql import IQL, IQLConfig
from o2o.agents.sac import RLPD, SAC, RLPDConfig, SACConfig
from o2o.agents.wsrl import WSRL, WSRLConfig

AGENTS: dict[str, type] = {"bc": BC, "iql": IQL, "cql": CQL, "calql": CalQL, "sac": SAC, "rlpd": RLPD, "wsrl": WSRL}

__all__ = [
    "AGENTS",
    "BC",
    "CQL",
    "IQL",
    "RLPD",
    "SAC",
    "WSRL",
    "BCConfig",
    "CQLConfig",
    "CalQL",
    "CalQLConfig",
    "Conservative",
    "IQLConfig",
    "RLPDConfig",
    "SACConfig",
    "WSRLConfig",
]
