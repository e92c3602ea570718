"""The experiment's configuration: frozen dataclasses, their validation, and the traced scalars.

A recipe in `configs/` returns a `ConfigDict` that holds every leaf (`default()`); `resolve` turns
it into a frozen `Config`, derives what is derived and refuses what cannot work, before anything is
traced. Scalars that change no array shape are passed separately, in one `Knobs` pytree, so that
changing them recompiles nothing.
"""

from moejax.config.errors import ConfigError as ConfigError
from moejax.config.errors import divisors as divisors
from moejax.config.errors import format_value as format_value
from moejax.config.errors import nearest as nearest
from moejax.config.knobs import Knobs as Knobs
from moejax.config.layer_pattern import LayerGroup as LayerGroup
from moejax.config.loss_specs import LOSS_SPECS as LOSS_SPECS
from moejax.config.loss_specs import LOSS_WEIGHTS as LOSS_WEIGHTS
from moejax.config.loss_specs import LossSpec as LossSpec
from moejax.config.of_evaluation import MOE_OF_TRAINING as MOE_OF_TRAINING
from moejax.config.of_evaluation import OF_COMPUTATION as OF_COMPUTATION
from moejax.config.of_evaluation import is_of_weights as is_of_weights
from moejax.config.parameter_groups import ParameterGroup as ParameterGroup
from moejax.config.parameter_groups import is_named as is_named
from moejax.config.parameter_groups import kind_of as kind_of
from moejax.config.parameter_groups import read_groups as read_groups
from moejax.config.parameter_groups import read_names as read_names
from moejax.config.resolve import default as default
from moejax.config.resolve import given_leaves as given_leaves
from moejax.config.resolve import resolve as resolve
from moejax.config.resolve import resolve_recorded as resolve_recorded
from moejax.config.resolve import to_config_dict as to_config_dict
from moejax.config.resolve import to_dict as to_dict
from moejax.config.resolve import with_defaults as with_defaults
from moejax.config.router_rules import ROUTER_RULES as ROUTER_RULES
from moejax.config.schema.describe import rows_of as rows_of
from moejax.config.schema.describe import settings_page as settings_page
from moejax.config.schema.leaf import names_file as names_file
from moejax.config.schema.tree import Declared as Declared
from moejax.config.schema.tree import check_key as check_key
from moejax.config.schema.tree import declared as declared
from moejax.config.schema.tree import leaves as leaves
from moejax.config.schema.tree import read_value as read_value
from moejax.config.schema.unread import UnreadError as UnreadError
from moejax.config.schema.unread import is_read as is_read
from moejax.config.schema.unread import refuse_unread as refuse_unread
from moejax.config.sections.alarms import AlarmConfig as AlarmConfig
from moejax.config.sections.attention import AttentionConfig as AttentionConfig
from moejax.config.sections.data import BYTE_VOCAB_SIZE as BYTE_VOCAB_SIZE
from moejax.config.sections.data import DataConfig as DataConfig
from moejax.config.sections.init import InitConfig as InitConfig
from moejax.config.sections.init import read_renames as read_renames
from moejax.config.sections.mesh import MeshConfig as MeshConfig
from moejax.config.sections.model import ModelConfig as ModelConfig
from moejax.config.sections.moe import MoeConfig as MoeConfig
from moejax.config.sections.mup import MupConfig as MupConfig
from moejax.config.sections.optimizer import OptimizerConfig as OptimizerConfig
from moejax.config.sections.root import SECTIONS as SECTIONS
from moejax.config.sections.root import Config as Config
from moejax.config.sections.schedules import Schedule as Schedule
from moejax.config.sections.schedules import ScheduleConfig as ScheduleConfig
from moejax.config.sections.schedules import active_top_k_of as active_top_k_of
from moejax.config.sections.schedules import parse_schedule as parse_schedule
from moejax.config.sections.train import TrainConfig as TrainConfig
from moejax.config.transfer import Transfer as Transfer
from moejax.config.transfer import embedding_deviation as embedding_deviation
from moejax.config.transfer import folded as folded
from moejax.config.transfer import folded_moe as folded_moe
from moejax.config.validation import check_vocabulary as check_vocabulary
