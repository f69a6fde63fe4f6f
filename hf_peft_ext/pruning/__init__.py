"""Thin copies of models: which rows and columns matter, and a model made of those alone."""

from .channels import Channels as Channels
from .channels import find_channels as find_channels
from .importance import Importance as Importance
from .importance import importance as importance
from .sizes import ThinSizes as ThinSizes
from .sizes import thin_config as thin_config
from .sizes import thin_sizes as thin_sizes
from .thin import ThinModel as ThinModel
from .thin import thin_copy as thin_copy
