"""The examination of a run before it starts: machine, launch, images, speed, recipe, and advice."""
