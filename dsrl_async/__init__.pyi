from dsrl_async.agent import Agent as Agent
from dsrl_async.agent import load_agent as load_agent

__version__: str
__all__ = ["Agent", "load_agent"]
