"""What the stages share: chain, artifacts, data, models, rollouts, tracking, the command line."""
