"""Labelling: from photographs and teachers to shards; a run can be killed and resumed at any moment."""
