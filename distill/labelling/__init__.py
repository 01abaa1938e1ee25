"""Who writes labels: from photographs and teachers to shards, killed and resumed at any moment."""
