"""The parts of `examples.batch_generate`: lines, batches by memory, sampling, and the run."""
