// Culvert joins the container networks of many Linux hosts into one flat network. See
// README.md, and docs/architecture.md for the path of a packet.
package main

import (
	"os"

	"culvert/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:])) }
