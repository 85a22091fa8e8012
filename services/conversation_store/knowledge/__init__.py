"""What chatbots answer from: how sources become passages, and how the passages for a message are found."""
