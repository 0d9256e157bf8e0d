"""Whether a checkpoint is served right: its tokens, templates and log probabilities beside independent references."""
