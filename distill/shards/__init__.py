"""Labels on disk: the codec of a sample, tars of samples, their mirror."""
