"""Prompt templates turn rows of data into prompts with choices, for training, evaluation and in-context learning."""

from hf_peft_ext.prompts.chat import chat as chat
from hf_peft_ext.prompts.dataset import PromptedDataset as PromptedDataset
from hf_peft_ext.prompts.demonstrations import context_length as context_length
from hf_peft_ext.prompts.demonstrations import with_demonstrations as with_demonstrations
from hf_peft_ext.prompts.evaluation import TemplateScores as TemplateScores
from hf_peft_ext.prompts.evaluation import evaluate_templates as evaluate_templates
from hf_peft_ext.prompts.labels import label_list_template as label_list_template
from hf_peft_ext.prompts.library import documented_fields as documented_fields
from hf_peft_ext.prompts.library import load_templates as load_templates
from hf_peft_ext.prompts.library import template_tasks as template_tasks
from hf_peft_ext.prompts.template import PromptTemplate as PromptTemplate
