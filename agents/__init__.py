"""The agents: `AGENTS` maps the command line's name to the class; configs are exported next to their agents."""

from o2o.agents.bc import BC, BCConfig
from o2o.agents.cql import CQL, CalQL, CalQLConfig, Conservative, CQLConfig
from o2o.agents.expo import EXPO, EXPOConfig
from o2o.agents.generative_bc import DiffusionBC, DiffusionBCConfig, FlowBC, FlowBCConfig
from o2o.agents.iql import IQL, IQLConfig
from o2o.agents.qc import QC, QCConfig
from o2o.agents.residual import Residual
from o2o.agents.residual_config import ResidualConfig
from o2o.agents.sac import RLPD, SAC, RLPDConfig, SACConfig
from o2o.agents.wsrl import WSRL, WSRLConfig

AGENTS: dict[str, type] = {"bc": BC, "iql": IQL, "cql": CQL, "calql": CalQL, "sac": SAC, "rlpd": RLPD, "wsrl": WSRL}
AGENTS |= {"diffusion_bc": DiffusionBC, "flow_bc": FlowBC}
AGENTS |= {"qc": QC}
AGENTS |= {"expo": EXPO}
AGENTS |= {"residual": Residual}

__all__ = [
    "AGENTS",
    "BC",
    "CQL",
    "EXPO",
    "IQL",
    "QC",
    "RLPD",
    "SAC",
    "WSRL",
    "Residual",
    "BCConfig",
    "CQLConfig",
    "CalQL",
    "CalQLConfig",
    "Conservative",
    "DiffusionBC",
    "DiffusionBCConfig",
    "EXPOConfig",
    "FlowBC",
    "FlowBCConfig",
    "IQLConfig",
    "QCConfig",
    "RLPDConfig",
    "ResidualConfig",
    "SACConfig",
    "WSRLConfig",
]
