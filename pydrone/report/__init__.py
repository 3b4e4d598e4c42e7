"""What a person looks at: evaluations, learning curves, flight paths, films, the view in a terminal."""
