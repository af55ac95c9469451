//go:build !amd64

package encap

const hasSumBlocks = false

func sumBlocks([]byte) uint64 { panic("encap: sumBlocks is for amd64") }
