"""The caption job, from the images it is about to the captions it leaves; job.py is where to start."""
