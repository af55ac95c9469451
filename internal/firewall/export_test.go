package firewall

import "github.com/google/nftables"

// NewStep returns a step that adds messages to a transaction.
func NewStep(command string, nft func(*nftables.Conn)) Step {
	return Step{Command: command, nft: func(c *nftables.Conn) error { nft(c); return nil }}
}
