"""Prompt templates: rows of data as prompts with choices, for training, evaluation and in-context learning."""

from .chat import chat as chat
from .dataset import PromptedDataset as PromptedDataset
from .demonstrations import context_length as context_length
from .demonstrations import with_demonstrations as with_demonstrations
from .evaluation import TemplateScores as TemplateScores
from .evaluation import evaluate_templates as evaluate_templates
from .labels import label_list_template as label_list_template
from .library import documented_fields as documented_fields
from .library import load_templates as load_templates
from .library import template_tasks as template_tasks
from .template import PromptTemplate as PromptTemplate
