"""Parts that several rooms' tests share: they run real code over real bytes."""
