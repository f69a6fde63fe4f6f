"""The catalogue of methods, and reports on a saved adapter and on a model."""

from hf_peft_ext.catalogue.entries import Entry as Entry
from hf_peft_ext.catalogue.entries import read_entries as read_entries
