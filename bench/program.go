package bench

import (
	"context"
	"errors"

	"culvert/internal/lab"
)

// Program is a datapath that is somebody else's program.
type Program struct {
	Name, About string
}

func programs() []*Program { return nil }

func (p *Program) available() (bool, string) { return false, "" }

func (s *site) startProgram(context.Context, *lab.Lab) error { return errors.New("no") }
