from shared.cpu import share_cores

share_cores()
