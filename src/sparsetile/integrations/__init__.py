"""Where sparsetile meets other libraries; each module imports its own when it is imported."""
