"""Ladder side-tuning (Sung et al. 2022): a side network beside a frozen backbone."""
