"""The agents. `AGENTS` maps the command line's names to classes; configs are exported next to their agents."""

from o2o.agents.awac import AWAC as AWAC, AWACConfig as AWACConfig
from o2o.agents.bc import BC as BC, BCConfig as BCConfig
from o2o.agents.cql import (
    CQL as CQL,
    CalQL as CalQL,
    CalQLConfig as CalQLConfig,
    Conservative as Conservative,
    CQLConfig as CQLConfig,
)
from o2o.agents.dsrl import DSRL as DSRL, DSRLConfig as DSRLConfig
from o2o.agents.expo import EXPO as EXPO, EXPOConfig as EXPOConfig
from o2o.agents.famo2o import FamO2O as FamO2O, FamO2OConfig as FamO2OConfig
from o2o.agents.famo2o_cql import FamO2OCQL as FamO2OCQL, FamO2OCQLConfig as FamO2OCQLConfig
from o2o.agents.fql import FQL as FQL, FQLConfig as FQLConfig
from o2o.agents.generative_bc import (
    DiffusionBC as DiffusionBC,
    DiffusionBCConfig as DiffusionBCConfig,
    FlowBC as FlowBC,
    FlowBCConfig as FlowBCConfig,
)
from o2o.agents.ibrl import IBRL as IBRL, IBRLConfig as IBRLConfig
from o2o.agents.ifql import IFQL as IFQL, IFQLConfig as IFQLConfig
from o2o.agents.iql import IQL as IQL, IQLConfig as IQLConfig
from o2o.agents.jsrl import JSRL as JSRL, JSRLConfig as JSRLConfig
from o2o.agents.pex import PEX as PEX, PEXConfig as PEXConfig
from o2o.agents.ppo import PPO as PPO, PPOConfig as PPOConfig
from o2o.agents.qam import QAM as QAM, QAMConfig as QAMConfig
from o2o.agents.qc import QC as QC, QCConfig as QCConfig
from o2o.agents.rebrac import ReBRAC as ReBRAC, ReBRACConfig as ReBRACConfig
from o2o.agents.registry import AGENTS as AGENTS, register_agent as register_agent
from o2o.agents.residual import Residual as Residual, ResidualConfig as ResidualConfig
from o2o.agents.sac import RLPD as RLPD, SAC as SAC, RLPDConfig as RLPDConfig, SACConfig as SACConfig
from o2o.agents.td3bc import TD3BC as TD3BC, TD3BCConfig as TD3BCConfig
from o2o.agents.td7 import TD7 as TD7, TD7Config as TD7Config
from o2o.agents.uni_o4 import UniO4 as UniO4, UniO4Config as UniO4Config
from o2o.agents.wsrl import WSRL as WSRL, WSRLConfig as WSRLConfig
