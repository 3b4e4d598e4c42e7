"""What a person looks at: evaluation, learning curves, pictures, video, and the live view of a training."""
