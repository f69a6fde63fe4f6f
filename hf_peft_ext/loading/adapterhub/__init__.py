"""Import of adapters that AdapterHub's library has saved: checkpoint -> filled sites -> config and state of peft."""

from hf_peft_ext.loading.adapterhub.load import from_adapterhub as from_adapterhub
